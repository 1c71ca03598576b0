"""Stage ``cit``, continual instruction tuning: TRL's SFTTrainer on a PEFT LoRA, completion-only loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from meristem.config import Recipe
from meristem.errors import BadInput
from meristem.methods.base import MethodState
from meristem.methods.registry import build
from meristem.training.adapters import (
    common_arguments,
    lora_config,
    refuse_long_rows,
    task_name,
    trainable_model,
)
from meristem.training.continual import continual

__all__ = ["as_prompt_completion", "build_trainer", "lora_config", "training_arguments"]

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
    """A trainer that continues the version in ``folder``: its adapter if it has one, else a fresh LoRA.

    ``rows`` are normalised rows with ``task`` and ``id``; ``history`` those of earlier tasks of the lineage.
    ``recipe.lora`` shapes a fresh LoRA only (``training.recipes`` settles it for one that is continued). Raises
    ``BadInput`` for rows, replayed ones included, that are longer than ``recipe.max_length``.
    """
    methods = [build(m.name, m.arguments) for m in recipe.methods]
    model, tokenizer = trainable_model(recipe, folder, base_folder)
    examples = [as_prompt_completion(row) for row in rows]
    arguments = training_arguments(recipe, output)
    arguments.max_length = None  # TRL would cut the answer off, and drop what is left without one
    trainer = continual(SFTTrainer, methods=methods, stage="cit")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=callbacks,
        task=task_name(rows),
        history={task: [as_prompt_completion(row) for row in old] for task, old in history.items()},
        method_state=dict(method_state or {}),
        progress=progress,
    )
    trainer.args.max_length = recipe.max_length
    found = trainer.train_dataset
    refuse_long_rows(found, [len(tokens) for tokens in found["input_ids"]], recipe.max_length)
    trainer.remove_callback(PrinterCallback)  # our own progress replaces a line of JSON per step
    return trainer


def training_arguments(recipe: Recipe, output: Path) -> SFTConfig:
    return SFTConfig(
        **common_arguments(recipe, output),
        max_length=recipe.max_length,
        completion_only_loss=True,
        packing=False,
    )


def as_prompt_completion(row: Row) -> Row:
    """A row as TRL's conversational prompt/completion, which the chat template and the loss mask need."""
    kept: Row = {key: row[key] for key in ("id", "task") if key in row}
    if "messages" in row:
        *prompt, last = row["messages"]
        return {"prompt": prompt, "completion": [last], **kept}
    if "completion" not in row:
        raise BadInput(f"row {row.get('id')}: stage cit needs messages, or prompt and completion")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return {"prompt": prompt, "completion": completion, **kept}
