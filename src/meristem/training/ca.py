"""Stage ``ca``, continual alignment: TRL's DPOTrainer on a PEFT LoRA or on all weights.

With u = log pi(y+|x) - log ref(y+|x) for the chosen answer, v the same for the rejected one, d = beta (u - v) and
e = ``label_smoothing``, ``recipe.preference.loss`` is per pair

    sigmoid       -log sigmoid(d)                                            DPO, arXiv 2305.18290
    sigmoid_norm  the same with u and v divided by the tokens of their answer       arXiv 2411.15124
    hinge         max(0, 1 - d)                                              SLiC, arXiv 2309.06657
    ipo           (u/|y+| - v/|y-| - 1 / (2 beta))^2                          arXiv 2310.12036
    robust        (-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2 e)   arXiv 2403.00409
    exo_pair      KL of (sigmoid(d), sigmoid(-d)) from (1 - e, e)             arXiv 2402.00856
    nca_pair      -log sigmoid(beta u) - (log sigmoid(-beta u) + log sigmoid(-beta v)) / 2    arXiv 2402.05369
    bco_pair      -log sigmoid(beta u) - log sigmoid(-beta v)                 arXiv 2404.04656, without its shift
    sppo_hard     (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2                 arXiv 2405.00675
    apo_zero      1 - sigmoid(beta u) + sigmoid(beta v)                       arXiv 2408.06266, eq. 7
    apo_down      sigmoid(beta u) + 1 - sigmoid(d)                            arXiv 2408.06266, eq. 8
    discopop      (1 - m) (-log sigmoid(d)) + m exp(-d), m = sigmoid(d / 0.05)     arXiv 2406.08414

TRL's ``aot`` losses sort the pairs of a micro-batch, so that its size would change the result, and its ``sft`` is
stage ``cit``: they are left out.

The reference is the version that is continued, adapter included: TRL 1.16 copies the adapter that it is given to a
frozen one named ``ref``. Without that copy PEFT's "adapter off" would make the bare base the reference, and an update
would be free to forget the preferences learned before it. Where all weights are trained it is a second, frozen
model, which TRL loads from the folder of the version that is continued.
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
    arguments = DPOConfig(
        **common_arguments(recipe, job["output"]),
        max_length=None,
        loss_type=[recipe.preference.loss],
        beta=recipe.preference.beta,
        label_smoothing=recipe.preference.label_smoothing,
    )
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
    if row["chosen"] == row["rejected"]:
        raise BadInput(
            f"row {row.get('id')}: chosen and rejected are the same answer; correct it or leave it out"
        )
    kept: Row = {key: row[key] for key in ("id", "task") if key in row}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for key, role in roles.items():
        value = row[key]
        kept[key] = [{"role": role, "content": value}] if isinstance(value, str) else value
    return kept
