"""Stage ``cit``, continual instruction tuning: TRL's SFTTrainer, completion-only loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from trl import SFTConfig, SFTTrainer

from meristem.config import Recipe
from meristem.errors import BadInput
from meristem.training.stages import Job, Row, common_arguments, refuse_long_rows, stage_trainer


def build_trainer(recipe: Recipe, **job: Unpack[Job]) -> Any:
    """A trainer that continues the version in ``folder``: its adapter if it has one, else a fresh LoRA or all weights.

    ``recipe.lora`` shapes a fresh LoRA only (``training.recipes`` settles it for one that is continued). Raises
    ``BadInput`` for rows, replayed ones included, that are longer than ``recipe.max_length``.
    """
    arguments = training_arguments(recipe, job["output"])
    arguments.max_length = None  # TRL would cut the answer off, and drop what is left without one
    trainer = stage_trainer("cit", SFTTrainer, arguments, as_prompt_completion, recipe, job)
    trainer.args.max_length = recipe.max_length
    found = trainer.train_dataset
    refuse_long_rows(found, [len(tokens) for tokens in found["input_ids"]], recipe.max_length)
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
