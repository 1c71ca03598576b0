"""What trainers offer to methods, by the names of their classes; needs neither torch nor TRL."""

from __future__ import annotations

from dataclasses import dataclass

LIKELIHOOD, NEXT_TOKEN = "likelihood", "next-token"
NEEDS = {
    LIKELIHOOD: "the likelihood of rows",
    NEXT_TOKEN: "next-token distributions over a labelled completion",
}


@dataclass(frozen=True)
class Kind:
    """``stages`` it serves (None: not known), ``offers`` out of ``Method.needs``, whether it ``generates`` its batches."""

    stages: frozenset[str] | None
    offers: frozenset[str] = frozenset()
    generates: bool = False


_TOKENS = frozenset(
    {LIKELIHOOD, NEXT_TOKEN}
)  # rows become token ids with labels; of a pair its chosen answer
_TEXT, _PAIRS, _RL = frozenset({"cpt", "cit"}), frozenset({"ca"}), frozenset({"rl"})
KNOWN: dict[str, Kind] = {
    "Trainer": Kind(None, _TOKENS),  # and, as is assumed, any trainer that is not known
    "SFTTrainer": Kind(_TEXT, _TOKENS),
    "DPOTrainer": Kind(_PAIRS, _TOKENS),
    "RewardTrainer": Kind(_PAIRS),
    "KTOTrainer": Kind(_PAIRS),
    "CPOTrainer": Kind(_PAIRS),
    "ORPOTrainer": Kind(_PAIRS),
    "GRPOTrainer": Kind(_RL, generates=True),
    "RLOOTrainer": Kind(_RL, generates=True),
    "DistillationTrainer": Kind(_RL, generates=True),  # on its own samples
    "OnlineDPOTrainer": Kind(None, generates=True),
    "GKDTrainer": Kind(_TEXT, generates=True),
    "SDFTTrainer": Kind(None, generates=True),
}
STAGES = {"cpt": "SFTTrainer", "cit": "SFTTrainer", "ca": "DPOTrainer"}
"""What the stages of a recipe train with."""


def kind_of(trainer_class: type) -> Kind:
    """By the nearest known name in its MRO."""
    names = (base.__name__ for base in trainer_class.__mro__)
    return next((KNOWN[name] for name in names if name in KNOWN), KNOWN["Trainer"])
