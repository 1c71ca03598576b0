"""What the seam refuses before training, by name and in one line (``Clash``)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import combinations
from types import CodeType
from typing import Any

from meristem.errors import BadInput, Clash
from meristem.methods.base import Method
from meristem.training import _sharding, _upstream


def clashes(trainer_cls: type, methods: Sequence[Method], stage: str | None) -> None:
    """Methods that cannot work together, or not with this class of trainer."""
    seen: set[str] = set()
    for method in methods:
        if not isinstance(method, Method):
            raise BadInput(f"{method!r} is not a Method: build one by name with meristem.methods.build")
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
    stages = frozenset({stage}) if stage else _upstream.stages_of(trainer_cls)
    for method in methods:
        if stages is not None and not stages & method.stages:
            raise Clash(
                f"method {method.label} works in stages {', '.join(sorted(method.stages))}, "
                f"not in {', '.join(sorted(stages))} ({trainer_cls.__name__})"
            )
        if method.overrides("around") and _upstream.generates_inputs(trainer_cls):
            raise Clash(
                f"method {method.label} runs a batch twice, and {trainer_cls.__name__} generates its batches"
            )
        if not _upstream.has_likelihood(trainer_cls) and asks_for(type(method), "batches", "loss_of"):
            raise Clash(
                f"method {method.label} needs the likelihood of rows, and {trainer_cls.__name__} has no batches "
                "of tokens and labels: use SFTTrainer"
            )


def packing(methods: Sequence[Method], options: Any) -> None:
    for method in methods:
        if method.columns and getattr(options, "packing", False):
            needs = " and ".join(sorted(method.columns))
            raise Clash(
                f"method {method.label} needs the {needs} of each row, which packing drops: packing=False"
            )


def streams(methods: Sequence[Method], given: Any) -> None:
    """``given`` is no list and no ``Dataset``: methods that read its rows would see none."""
    if given is None:
        return
    names = [m.label for m in methods if m.overrides("prepare_data") or asks_for(type(m), "batches", "rows")]
    if names:
        raise Clash(
            f"{', '.join(names)} needs the rows at hand: pass a datasets.Dataset or a list, not a stream"
        )


def gradients(methods: Sequence[Method], trainer: Any) -> None:
    """Runs whose ``param.grad`` is not what a method would take it for."""
    reason = _upstream.unusual_gradients(trainer.accelerator)
    accumulates = _upstream.sharded_by_accelerate(trainer.accelerator) and (
        trainer.args.gradient_accumulation_steps > 1
    )
    for method in methods:
        if reason and (method.overrides("penalty") or method.overrides("gradients")):
            raise Clash(f"method {method.label} works on plain gradients, this run has {reason}")
        if accumulates and method.overrides("around"):
            raise Clash(
                f"method {method.label} needs the gradient of each micro-batch, which FSDP2 keeps to itself "
                "until the last one: gradient_accumulation_steps=1"
            )


def sharded_term(method: Method, value: Any) -> None:
    """A term of the parameters themselves: FSDP2 would reduce its gradient once more."""
    if _sharding.sharded([value]):
        raise Clash(
            f"method {method.label} has a loss term of sharded weights: make it a penalty, or train unsharded"
        )


def asks_for(method_class: type[Method], *names: str) -> bool:
    """Whether the method's own code names one of these attributes of ``Context`` or ``Step``."""
    own = [base for base in method_class.__mro__ if issubclass(base, Method) and base is not Method]
    found = [
        inspect.unwrap(getattr(f, "__func__", f)) for base in own for f in vars(base).values() if callable(f)
    ]
    codes = [f.__code__ for f in found if hasattr(f, "__code__")]
    return any(_names(code) & set(names) for code in codes)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
