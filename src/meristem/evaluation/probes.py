"""What a training run can be watched with: bad settings, probes and trainers are refused before the first step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult
from meristem.evaluation.run import prepare
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def readable(probe: Suite | str | Path) -> Suite:
    """The suite of ``probe`` (or of the file at that path), ready to run in the training process."""
    if isinstance(probe, str | Path):
        probe = load_suite(probe)
    if not isinstance(probe, Suite):
        raise BadInput(f"probe is a suite or the path of a suite file, not {type(probe).__name__}")
    if not probe.size:
        raise BadInput(f"suite {probe.name!r} has no items; a probe needs some")
    for task in probe.tasks:
        reason = None
        if getattr(task.settings, "judge", None):
            reason = "a judge is not asked during training"
        elif task.settings.BRINGS_ITEMS:
            reason = f"a harness ({task.type}) does not run inside of a training"
        if reason:
            raise BadInput(f"suite {probe.name!r}, task {task.name!r}: {reason}; leave the task out")
    prepare(probe)
    return probe


def check_settings(
    patience: int | None, every: int | float, alpha: float, name: str, batch_tokens: int
) -> None:
    if patience is not None and not _count(patience):
        raise BadInput(f"patience is a number of looks, 1 or more, or None to only watch, not {patience!r}")
    if not _count(every) and not (isinstance(every, float) and 0 < every < 1):
        raise BadInput(f"every is a number of steps or a share of them between 0 and 1, not {every!r}")
    if not isinstance(alpha, float) or not 0 < alpha < 0.5:
        raise BadInput(f"alpha is a chance between 0 and 0.5 (for example 0.05), not {alpha!r}")
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"name is what the logged names begin with, not {name!r}")
    if not _count(batch_tokens):
        raise BadInput(f"batch_tokens must be at least 1, not {batch_tokens!r}")


def check_margin(margin: float, probe: Suite) -> None:
    share = probe.unit == "share"
    number = isinstance(margin, int | float) and math.isfinite(margin)
    if not number or margin < 0 or (share and margin >= 1):
        bounds = "between 0 and 1 (0.02 means two points)" if share else "0 or more"
        raise BadInput(f"margin is a loss that is tolerated, {bounds}, not {margin!r}")


def check_trainer(trainer: Any) -> None:
    name, model = type(trainer).__name__, trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:
        raise BadInput(
            f"{name} trains a model that writes no text ({type(model).__name__}): nothing to probe"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadInput(f"{type(model).__name__} has an encoder; probes run on causal language models")
    if tokenizer_of(trainer) is None:
        raise BadInput(f"{name} has no tokenizer to read the probe with; give it processing_class=")
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if kind in SHARDING or any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise BadInput(
            "the weights are sharded; ForgettingCallback works on whole ones (one process or DDP): "
            "train so, or without it"
        )


def tokenizer_of(trainer: Any) -> Any:
    """Of a processor, the tokenizer that it holds."""
    given = trainer.processing_class
    return getattr(given, "tokenizer", given)


def can_fall(baseline: Sequence[ItemResult]) -> int:
    """How many sources (items, where none is shared) have something to lose."""

    def source(row: ItemResult) -> Hashable:
        return row.get("cluster") or (row["task"], row["id"])

    return len({source(row) for row in baseline if "unit" in row or row["score"] > 0})


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
