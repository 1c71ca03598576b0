"""The learning rate of every step, from a recipe: the only place where ``schedule`` and its parts become numbers.

With n steps, t = 0 ... n - 1, eta = ``learning_rate`` and w = ceil(n ``warmup_share``) every schedule but a later
phase of ``infinite`` begins with eta t / w for t < w. Then:

    linear     eta (n - t) / (n - w)
    cosine     eta (1 + cos(pi (t - w) / (n - w))) / 2                    Loshchilov & Hutter (arXiv 1608.03983)
    constant   eta
    wsd        eta, and in the last d = ceil(n ``decay_share``) steps     Hu et al. (arXiv 2404.06395), with the decay
               f + (eta - f) (1 - sqrt((t - n + d) / d))                  of Haegele et al. (arXiv 2405.18392)
    infinite   start: c + (eta - c) (1 + cos(pi (t - w) / k)) / 2 for k = ceil(n ``cooldown_share``) steps, then c
               continue: c
               anneal: c, and in the last d steps c (f / c)^((t - n + d) / d)

with f = ``final_rate`` (a warm-up of ``wsd`` begins at f) and c = ``constant_rate``. The infinite schedule is the
cosine one of Ibrahim et al. (arXiv 2403.08763) and Singh et al. (arXiv 2503.02844), cut where updates end: one
``start``, then any number of ``continue``, and ``anneal`` on a branch that nothing continues.

All but ``infinite`` are transformers' own. A rate is a function of t alone, so that a resumed run has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from meristem.config import Recipe
from meristem.errors import BadInput

DECAY_SHARE = {"wsd": 0.1, "infinite": 1.0}  # an annealing branch anneals from its first step
COOLDOWN_SHARE = 0.25
FINAL_OF_CONSTANT = 0.1

_TRANSFORMERS = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay", "infinite": "constant"}


def transformers_name(recipe: Recipe) -> str:
    """``lr_scheduler_type`` of the recipe's schedule; ``scheduled`` replaces what stands for ``infinite``."""
    return _TRANSFORMERS.get(recipe.schedule, recipe.schedule)


def scheduled(trainer_cls: type, recipe: Recipe) -> type:
    """``trainer_cls`` with the recipe's learning rates, under the same name.

    ``BadInput`` before the first step when the schedule's parts do not fit the number of steps.
    """
    own = {"scheduled_by": recipe, "__module__": trainer_cls.__module__, "__doc__": trainer_cls.__doc__}
    return type(trainer_cls.__name__, (_Scheduled, trainer_cls), own)


class _Scheduled:
    """Stands before a trainer in the MRO and makes its scheduler."""

    scheduled_by: Recipe
    args: Any
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        recipe = self.scheduled_by
        *_, decay = parts(recipe, num_training_steps)
        if recipe.schedule == "infinite":
            if self.lr_scheduler is None:
                rate = infinite(recipe, num_training_steps)
                self.lr_scheduler = LambdaLR(
                    optimizer or self.optimizer, lambda step: rate(step) / recipe.learning_rate
                )
            return self.lr_scheduler
        if recipe.schedule == "wsd":
            self.args.lr_scheduler_kwargs = {
                "num_decay_steps": decay,
                "decay_type": "1-sqrt",
                "min_lr_ratio": (recipe.final_rate or 0.0) / recipe.learning_rate,
            }
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]


def parts(recipe: Recipe, steps: int) -> tuple[int, int, int]:
    """Steps of warm-up, cooldown and decay in a run of ``steps``; ``BadInput`` where they do not fit into it."""
    phase = recipe.phase or "start"
    first = recipe.schedule != "infinite" or phase == "start"
    warmup = math.ceil(steps * recipe.warmup_share) if first else 0
    cooldown = decay = 0
    if recipe.schedule == "infinite" and phase == "start":
        cooldown = math.ceil(steps * (recipe.cooldown_share or COOLDOWN_SHARE))
    if recipe.schedule == "wsd" or phase == "anneal":
        decay = math.ceil(steps * (recipe.decay_share or DECAY_SHARE[recipe.schedule]))
    if warmup + cooldown + decay > steps:
        asked = {"warm-up": warmup, "cooldown": cooldown, "decay": decay}
        named = " and ".join(f"{count} of {part}" for part, count in asked.items() if count)
        raise BadInput(
            f"recipe: schedule {recipe.schedule} needs {named}, each part rounded up, and the run has {steps} "
            "steps: train longer, or lower the shares"
        )
    return warmup, cooldown, decay


def infinite(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Step -> learning rate of the recipe's phase of the infinite schedule, in a run of ``steps``."""
    warmup, cooldown, decay = parts(recipe, steps)
    constant = recipe.constant_rate
    if constant is None:
        raise BadInput(
            "recipe.constant_rate: missing; schedule infinite holds this rate from update to update"
        )
    final = recipe.final_rate or FINAL_OF_CONSTANT * constant
    top = recipe.learning_rate
    return partial(
        _infinite,
        warmup=warmup,
        cooldown=cooldown,
        hold=steps - decay,
        decay=decay,
        rates=(top, constant, final),
    )


def _infinite(
    step: int, *, warmup: int, cooldown: int, hold: int, decay: int, rates: tuple[float, float, float]
) -> float:
    top, constant, final = rates
    if step < warmup:
        return top * step / warmup
    if step < warmup + cooldown:
        return constant + (top - constant) / 2 * (1 + math.cos(math.pi * (step - warmup) / cooldown))
    if step < hold or not decay:
        return constant
    return constant * float((final / constant) ** ((step - hold) / decay))
