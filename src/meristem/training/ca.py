"""Stage ``ca``, continual alignment: TRL's DPOTrainer on a PEFT LoRA or on all weights.

    loss = -log sigmoid(beta ((log pi(y+|x) - log ref(y+|x)) - (log pi(y-|x) - log ref(y-|x))))

The reference is the version that is continued, adapter included: TRL 1.16 copies the adapter that it is given to a
frozen one named ``ref``. Without that copy PEFT's "adapter off" would make the bare base the reference, and an update
would be free to forget the preferences learned before it. Where all weights are trained it is a second, frozen model, which
TRL loads from the folder of the version that is continued.

Source: Rafailov et al. 2023 (arXiv 2305.18290). beta 0.1, TRL's default.
"""

from __future__ import annotations

from typing import Any, Unpack

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from meristem.config import Recipe
from meristem.errors import BadInput, Clash
from meristem.training.stages import Job, Row, common_arguments, refuse_long_rows, stage_trainer

REFERENCE = "ref"


def build_trainer(recipe: Recipe, **job: Unpack[Job]) -> Any:
    """As ``cit.build_trainer``, for rows with ``prompt``, ``chosen`` and ``rejected``."""
    arguments = DPOConfig(**common_arguments(recipe, job["output"]), max_length=None)
    trainer = stage_trainer("ca", DPOTrainer, arguments, as_preference, recipe, job)
    if recipe.weights == "lora" and REFERENCE not in trainer.model.peft_config:
        raise Clash(
            "this TRL made no reference adapter, so the reference would be the bare base: use TRL 1.16"
        )
    refuse_long_rows(trainer.train_dataset, _lengths(trainer.train_dataset), recipe.max_length)
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
