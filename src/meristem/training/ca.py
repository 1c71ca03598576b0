"""Stage ``ca``, continual alignment: TRL's DPOTrainer on a PEFT LoRA.

    loss = -log sigmoid(beta ((log pi(y+|x) - log ref(y+|x)) - (log pi(y-|x) - log ref(y-|x))))

The reference is the version that is continued, adapter included: TRL 1.16 copies the adapter that it is given to a
frozen one named ``ref``. Without that copy PEFT's "adapter off" would make the bare base the reference, and an update
would be free to forget the preferences learned before it.

Source: Rafailov et al. 2023 (arXiv 2305.18290). beta 0.1, TRL's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from meristem.config import Recipe
from meristem.errors import BadInput, Clash
from meristem.methods.base import MethodState
from meristem.methods.registry import build
from meristem.training.adapters import common_arguments, refuse_long_rows, task_name, trainable_model
from meristem.training.continual import continual

REFERENCE = "ref"

Row = dict[str, Any]


def build_trainer(
    recipe: Recipe,
    *,
    folder: Path,
    base_folder: Path | None,
    rows: Sequence[Row],
    history: Mapping[str, Sequence[Row]],
    method_state: Mapping[str, MethodState] | None,
    output: Path,
    callbacks: list[TrainerCallback],
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Any:
    """As ``cit.build_trainer``, for rows with ``prompt``, ``chosen`` and ``rejected``."""
    methods = [build(m.name, m.arguments) for m in recipe.methods]
    model, tokenizer = trainable_model(recipe, folder, base_folder)
    trainer = continual(DPOTrainer, methods=methods, stage="ca")(
        model=model,
        args=DPOConfig(**common_arguments(recipe, output), max_length=None),
        train_dataset=Dataset.from_list([as_preference(row) for row in rows]),
        processing_class=tokenizer,
        callbacks=callbacks,
        task=task_name(rows),
        history={task: [as_preference(row) for row in old] for task, old in history.items()},
        method_state=dict(method_state or {}),
        progress=progress,
    )
    if REFERENCE not in trainer.model.peft_config:
        raise Clash(
            "this TRL made no reference adapter, so the reference would be the bare base: use TRL 1.16"
        )
    refuse_long_rows(trainer.train_dataset, _lengths(trainer.train_dataset), recipe.max_length)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _lengths(tokenized: Dataset) -> list[int]:
    """Tokens of the longer of the two sequences of each row."""
    columns = (tokenized[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) + max(len(good), len(bad)) for prompt, good, bad in zip(*columns, strict=True)]


def as_preference(row: Row) -> Row:
    """A row as TRL's conversational preference pair, so that the chat template is applied."""
    if not {"prompt", "chosen", "rejected"} <= row.keys():
        raise BadInput(f"row {row.get('id')}: stage ca needs prompt, chosen and rejected")
    kept: Row = {key: row[key] for key in ("id", "task") if key in row}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for key, role in roles.items():
        value = row[key]
        kept[key] = [{"role": role, "content": value}] if isinstance(value, str) else value
    return kept
