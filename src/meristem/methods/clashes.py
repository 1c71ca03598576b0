"""Methods that cannot work together, or not with a class of trainer: told without a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from meristem.errors import BadInput, Clash
from meristem.methods.base import Method
from meristem.methods.trainers import NEEDS, Kind


def refuse(methods: Sequence[Method], trainer: str, kind: Kind, stage: str | None = None) -> None:
    """``Clash`` where ``methods`` do not go together, or not with the trainer named ``trainer``.

    ``stage`` says which one it serves, where that is not the trainer's own.
    """
    if not isinstance(methods, list | tuple):
        raise BadInput(f"methods={methods!r}: give a list, e.g. [EWC()]")
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise BadInput(f"{method.__name__} is a class: give {method.__name__}(), with its arguments")
        if not isinstance(method, Method):
            raise BadInput(f"{method!r} is not a Method: build one by name with meristem.methods.build")
    _pairs(methods)
    stages = frozenset({stage}) if stage else kind.stages
    for method in methods:
        if stages is not None and not stages & method.stages:
            raise Clash(
                f"method {method.label} works in stages {', '.join(sorted(method.stages))}, "
                f"not in {', '.join(sorted(stages))} ({trainer})"
            )
        if method.overrides("around") and kind.generates:
            raise Clash(f"method {method.label} runs a batch twice, and {trainer} generates its batches")
        for need in sorted(method.needs - kind.offers):
            raise Clash(
                f"method {method.label} needs {NEEDS.get(need, need)}, and {trainer} has no batches "
                "of tokens and labels: use SFTTrainer"
            )


def _pairs(methods: Sequence[Method]) -> None:
    seen: set[str] = set()
    for method in methods:
        if method.label in seen:
            raise Clash(f"method {method.label} is given twice: keep one")
        seen.add(method.label)
    for first, second in combinations(methods, 2):
        if isinstance(first, type(second)) or isinstance(second, type(first)):
            raise Clash(f"methods {first.label} and {second.label} are one technique in two forms: keep one")
    for method in methods:
        if method.alone and len(methods) > 1:
            others = ", ".join(m.label for m in methods if m is not method)
            raise Clash(f"method {method.label} is a baseline and goes with no other: drop it, or {others}")
    builders = [m.label for m in methods if m.replaces_architecture]
    if len(builders) > 1:
        raise Clash(f"methods {' and '.join(builders)} both replace the architecture: keep one")
    for method in methods:
        other = next((m for m in methods if m is not method and trains_other_weights(m)), None)
        if method.weight_state and other is not None:
            raise Clash(
                f"method {method.label} remembers the weights in training, and {other.label} trains other ones in "
                "the next update: drop one"
            )


def trains_other_weights(method: Method | type[Method]) -> bool:
    """Whether an update with it trains other weights, or of another shape, than the update before it."""
    return method.fresh_adapter or method.replaces_architecture
