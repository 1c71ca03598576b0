"""Stage ``cpt``, continual pre-training: TRL's SFTTrainer on plain text, loss on every token but a row's first.

Unpacked, a text longer than ``max_length`` becomes several rows, so that nothing of it is dropped (TRL would cut it),
each keeping the text's ``id`` and ``task``. Packed, nothing is dropped either; a row's id and task are lost in it:

- ``packing: true`` joins texts, end of text between them, and cuts blocks of ``max_length`` (TRL's ``wrapped``). A
  block is one row to the model: tokens attend to the texts before theirs, and a text's first token is predicted from
  the text before it.
- ``packing: documents`` cuts only texts longer than ``max_length`` and fits whole ones into blocks (TRL's
  ``bfd_split``). Positions begin at 0 in each text, no text attends to another, and its first token is not predicted.
  A micro-batch is one row of all its blocks, whose attention mask is quadratic in that row without FlashAttention.
"""

from __future__ import annotations

from typing import Any, Unpack

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from meristem.config import Recipe
from meristem.errors import BadInput
from meristem.training.stages import Job, Row, common_arguments, stage_trainer


def build_trainer(recipe: Recipe, **job: Unpack[Job]) -> Any:
    """As ``cit.build_trainer``, for rows with ``text``. ``Clash`` for a method that needs what packing drops."""
    arguments = SFTConfig(
        **common_arguments(recipe, job["output"]),
        max_length=recipe.max_length,
        packing=bool(recipe.packing),
        packing_strategy="bfd_split" if recipe.packing == "documents" else "wrapped",
    )
    if not recipe.packing:
        arguments.max_length = None  # so that TRL cuts nothing off
    trainer = stage_trainer("cpt", SFTTrainer, arguments, _as_text, recipe, job)
    trainer.args.max_length = recipe.max_length
    if not recipe.packing:
        trainer.train_dataset = windows(trainer.train_dataset, recipe.max_length)
    return trainer


def windows(tokenized: Dataset, size: int) -> Dataset:
    """Rows of at most ``size`` tokens: a longer one is cut into several, in order, every token in exactly one."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in batch}
        for at, tokens in enumerate(batch["input_ids"]):
            for start in range(0, len(tokens), size):
                for name, column in batch.items():
                    along = isinstance(column[at], list) and len(column[at]) == len(tokens)
                    found[name].append(column[at][start : start + size] if along else column[at])
        return found

    return tokenized.map(cut, batched=True)


def _as_text(row: Row) -> Row:
    if "text" not in row:
        raise BadInput(f"row {row.get('id')}: stage cpt needs text")
    return {key: row[key] for key in ("text", "id", "task") if key in row}
