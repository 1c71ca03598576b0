"""Private and unstable names of transformers, TRL, PEFT and accelerate that Meristem touches; ``_lean`` has the others.

Tested on the versions of constraints-oldest.txt and of constraints.txt. When an upgrade breaks the seam, the cause
is in one of the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor

from meristem.errors import BadInput, Clash
from meristem.training import _tags


class PrivateHooks:
    """The private methods of ``Trainer`` that the seam extends; stands before the trainer in the MRO."""

    args: Any
    state: Any
    accelerator: Any
    _signature_columns: list[str] | None

    def checkpoint_written(self, folder: Path) -> None:
        """Called on every process when Hugging Face has written ``folder``, before old ones are deleted."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = list(self._signature_columns or [])
        self._signature_columns = columns + [name for name in _tags.KEYS if name not in columns]

    def _generate_and_score_completions(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # GRPO's and its kin's: what is made of many rows is shuffled and sliced into micro-batches afterwards.
        made = super()._generate_and_score_completions(inputs, *args, **kwargs)  # type: ignore[misc]
        return {**made, **_tags.packed(inputs)}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if type(sampler).__name__ == "RepeatSampler" and sampler.shuffle and sampler.seed is not None:
            sampler.set_epoch = partial(_to_epoch, sampler)
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Resumed from a checkpoint of its last step, in the middle of an epoch, Hugging Face trains one more.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Hugging Face deletes old checkpoints inside this call. Killed right after that, a run with
        # save_total_limit=1 would be left with the new folder only, before our COMPLETE is in it.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        self.checkpoint_written(folder / f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            _rotate(self, folder)


def _to_epoch(sampler: Any, epoch: int) -> None:
    """GRPO's sampler draws one order after the other and, resumed, would begin again with the first."""
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(epoch):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


def _rotate(trainer: Any, folder: Path) -> None:
    try:
        from transformers.trainer_utils import rotate_checkpoints
    except ImportError:
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(folder))
        return
    rotate_checkpoints(
        output_dir=str(folder),
        save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint,
        use_mtime=True,
    )


def by_name(
    trainer_class: type, seam: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A trainer's arguments by their names, positional ones as its constructor calls them.

    A constructor that only passes on (``*args, **kwargs``) says nothing: the next one behind it is asked.
    """
    behind = trainer_class.__mro__[trainer_class.__mro__.index(seam) + 1 :]
    for initializer in (vars(base)["__init__"] for base in behind if "__init__" in vars(base)):
        parameters = list(inspect.signature(initializer).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) <= len(names):
            twice = sorted(set(names[: len(args)]) & kwargs.keys())
            if twice:
                raise BadInput(f"{trainer_class.__name__} got {', '.join(twice)} twice: by place and by name")
            return {**dict(zip(names, args, strict=False)), **kwargs}
        if any(p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    raise BadInput(f"{trainer_class.__name__} takes fewer positional arguments than {len(args)}: name them")


def continue_token_count(trainer: Any) -> None:
    """Let a resumed run count tokens on from where it stopped; TRL starts again at zero."""
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    if counted and hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = counted[-1]


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether ``compute_loss`` already divides for gradient accumulation (else ``training_step`` does)."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return bool(declared)
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return bool(counted or trainer.compute_loss_func is not None)


def accumulation_steps(trainer: Any) -> int:
    """Micro-batches of the optimizer step under way; the last step of an epoch may have fewer."""
    return int(
        getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    )


def tokenized(trainer: Any, rows: Sequence[dict[str, Any]]) -> Dataset:
    """``rows`` as the trainer itself tokenizes them, unpacked; rows with ``input_ids`` pass through."""
    data = Dataset.from_list([dict(row) for row in rows])
    if "input_ids" in data.column_names:
        return data
    if _is(trainer, "DPOTrainer"):
        pairs = trainer._prepare_dataset(data, trainer.processing_class, trainer.args, "method")
        return pairs.map(_chosen, fn_kwargs={"limit": trainer.args.max_length})
    if not _is(trainer, "SFTTrainer"):
        raise Clash(
            f"{type(trainer).__name__} cannot turn raw rows into likelihood batches: use SFTTrainer or rows "
            "with input_ids and labels"
        )
    shuffle, trainer.args.shuffle_dataset = getattr(trainer.args, "shuffle_dataset", False), False
    try:
        formatting = getattr(trainer, "_formatting_func", None)
        made = trainer._prepare_dataset(
            data, trainer.processing_class, trainer.args, False, formatting, "method"
        )
        return made if "labels" in made.column_names else made.map(_with_labels)
    finally:
        trainer.args.shuffle_dataset = shuffle


def _with_labels(row: dict[str, Any]) -> dict[str, Any]:
    """``labels`` where TRL (1.0) leaves masks to its collator."""
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    kept = [all(marks) for marks in zip(*masks, strict=True)] if masks else [True] * len(row["input_ids"])
    return {"labels": [token if keep else -100 for token, keep in zip(row["input_ids"], kept, strict=True)]}


def _chosen(pair: dict[str, Any], limit: int | None) -> dict[str, list[int]]:
    """Prompt and chosen answer of a tokenized pair, the answer labelled, cut as DPOTrainer's collator cuts them."""
    prompt, answer = pair["prompt_ids"], pair["chosen_ids"]
    return {"input_ids": (prompt + answer)[:limit], "labels": ([-100] * len(prompt) + answer)[:limit]}


def likelihood_collator(trainer: Any) -> Any:
    """What makes a batch of ``tokenized`` rows: the trainer's own collator, except where that one pairs answers."""
    if not _is(trainer, "DPOTrainer"):
        return trainer.data_collator
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=trainer.processing_class.pad_token_id)


def _is(trainer: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(trainer).__mro__)


def backbone(model: nn.Module) -> nn.Module:
    """The transformer under the language-model head, through PEFT."""
    inner = causal_model(model)
    return getattr(inner, "base_model", inner)


def causal_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has put its fused head on the model; to be asked before accelerate wraps ``forward``."""
    forward: Any = getattr(vars(causal_model(model)).get("forward"), "__func__", None)
    return hasattr(forward, "__code__") and forward.__code__.co_name == "_fused_forward"


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The same model without its PEFT adapter."""
    if not hasattr(model, "disable_adapter"):
        raise Clash("a method asks for a reference model: train an adapter, or pass reference_model=")
    with model.disable_adapter():
        yield model


def unusual_gradients(accelerator: Any) -> str | None:
    """Why ``param.grad`` does not hold plain gradients in this run, or None."""
    if getattr(accelerator, "scaler", None) is not None:
        return "fp16 gradient scaling (use bf16)"
    if str(getattr(accelerator, "distributed_type", "")).endswith("DEEPSPEED"):
        return "DeepSpeed (use FSDP2 or DDP)"
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        return "FSDP1, whose parameters are flattened (use FSDP2)"
    return None


def is_quantized(parameter: Any) -> bool:
    """Whether it holds its values packed (bitsandbytes, GPTQ) or as a tensor of its own kind (torchao, quanto)."""
    kind = type(parameter.data)
    plain = kind in (torch.Tensor, nn.Parameter) or hasattr(parameter, "full_tensor")
    return not plain or not parameter.is_floating_point()


def gathers(model: nn.Module) -> bool:
    """Whether transformers sharded the model when it loaded it, and so gathers it to save it."""
    return bool(getattr(causal_model(model), "is_distributed_loading_by_transformers", False))


def sharded_by_accelerate(accelerator: Any) -> bool:
    """Whether accelerate shards the weights (FSDP2), and so keeps gradients back until the last micro-batch."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def sharding_of(params: Iterable[Any]) -> str | None:
    """What shards the weights, or will once accelerate prepares them; None where every process has whole ones."""
    kind = str(AcceleratorState().distributed_type).rpartition(".")[2] if is_initialized() else ""
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return kind
    return "DTensor" if any(isinstance(p, DTensor) for p in params) else None
