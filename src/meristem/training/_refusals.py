"""What the seam refuses of a model, a data set or a run before training, by name and in one line (``Clash``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from meristem.errors import BadInput, Clash
from meristem.methods.base import Context, Method, Step
from meristem.training import _sharding, _upstream

Given = TypeVar("Given", Context, Step)


def shapes(method_state: Any, history: Any) -> None:
    """What a user hands over besides the trainer's own arguments."""
    if not isinstance(method_state, Mapping | None):
        raise BadInput("method_state: give what method_state() gave, or the folder of save_method_state")
    if not isinstance(history, Mapping | None):
        raise BadInput("history: give a dict from the name of each earlier task to its rows")


def packing(methods: Sequence[Method], options: Any) -> None:
    """``padding_free`` joins the rows of a batch into one, as packing does."""
    joins = next((name for name in ("packing", "padding_free") if getattr(options, name, False)), None)
    for method in methods if joins else ():
        if method.columns:
            needs = " and ".join(sorted(method.columns))
            raise Clash(
                f"method {method.label} needs the {needs} of each row, which {joins} drops: {joins}=False"
            )


def best_model(methods: Sequence[Method], options: Any) -> None:
    """Hugging Face would put earlier weights back, and the methods would still hold what goes with the last ones."""
    if not getattr(options, "load_best_model_at_end", False):
        return
    hooks = ("prepare_model", "weights", "penalty", "gradients")
    holding = [m for m in methods if m.overrides("state_dict") and any(map(m.overrides, hooks))]
    if holding:
        raise Clash(
            f"method {holding[0].label} keeps state that goes with the weights it was trained to, and earlier ones would "
            "come back without theirs: load_best_model_at_end=False"
        )


def streams(methods: Sequence[Method], given: Any) -> None:
    """``given`` is no list and no ``Dataset``: methods that read its rows would see none."""
    if given is None:
        return
    names = [m.label for m in methods if m.overrides("prepare_data") or "likelihood" in m.needs]
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


def sharded(methods: Sequence[Method], params: Mapping[str, Any]) -> None:
    """A process would hold a part of each weight only: methods that say that they need whole ones."""
    whole = [method.label for method in methods if not method.sharded]
    if whole and (kind := _upstream.sharding_of(params.values())):
        raise Clash(
            f"method {', '.join(whole)} needs whole weights, this run shards them ({kind}): use one device or DDP"
        )


def sharded_term(method: Method, value: Any) -> None:
    """A term of the parameters themselves: FSDP2 would reduce its gradient once more."""
    if _sharding.sharded([value]):
        raise Clash(
            f"method {method.label} has a loss term of sharded weights: make it a penalty, or train unsharded"
        )


def model_init(methods: Sequence[Method], arguments: Mapping[str, Any]) -> None:
    """Hugging Face would build another model at ``train()``, after the methods have taken hold of the first."""
    if methods and arguments.get("model_init") is not None:
        raise Clash(f"{', '.join(m.label for m in methods)} cannot follow model_init: pass model=")


def quantized(methods: Sequence[Method], params: Mapping[str, Any]) -> None:
    """Weights in training that are quantized; under an adapter the quantized base is not in training."""
    name = next((name for name, parameter in params.items() if _upstream.is_quantized(parameter)), None)
    for method in methods if name else ():
        if any(
            method.overrides(hook) for hook in ("prepare_model", "penalty", "gradients", "weights", "around")
        ):
            raise Clash(
                f"method {method.label} computes with the weights in training, and {name} is quantized: train an "
                "adapter on it, or the model unquantized"
            )


def checkpoints(trainer: Any, writes: bool) -> None:
    """Sharded before the trainer was made, by nobody who gathers: Hugging Face would save a rank's own shards."""
    if writes and _sharding.sharded(trainer.parameters().values()) and not _upstream.gathers(trainer.model):
        raise Clash(
            f"{type(trainer).__name__} can neither write nor read checkpoints of weights sharded by fully_shard: "
            'save_strategy="no", or let accelerate shard them (FSDP2)'
        )


def declared(method: Method, given: Given) -> Given:
    """``given`` for this method: what it has not declared in ``needs`` says so when it is called."""
    if "likelihood" in method.needs:
        return given

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise Clash(
            f"method {method.label} asks for the likelihood of rows, which not every trainer has: declare it by "
            'needs = frozenset({"likelihood"})'
        )

    if isinstance(given, Step):
        return replace(given, loss_of=refuse)
    return replace(given, batcher=refuse, loss_of=refuse)
