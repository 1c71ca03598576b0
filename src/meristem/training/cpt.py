"""Stage ``cpt``, continual pre-training: TRL's SFTTrainer on plain text, loss on every token.

Unpacked, a text longer than ``max_length`` becomes several rows, so that nothing of it is dropped (TRL would cut it),
each keeping the text's ``id`` and ``task``. With ``packing`` texts are joined and cut into blocks of ``max_length``, end
of text between them (TRL's ``wrapped`` strategy); a row's id and task are lost in that.
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
        packing=recipe.packing,
        packing_strategy="wrapped",
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
