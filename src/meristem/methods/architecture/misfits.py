"""Experts that are not of the base they come to, or not what they say: a bundle may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from meristem.errors import BadInput

if TYPE_CHECKING:
    from meristem.methods.architecture.experts import Expert


def refuse_misfits(model: Any, modules: Mapping[str, Any], experts: Sequence[Expert]) -> None:
    """``BadInput`` for an expert of another base or shape than it says, or with numbers that are none."""
    width = model.get_input_embeddings().weight.shape[1]
    for expert in experts:
        for odd in (*_of_layers(expert, modules), *_of_router(expert, width), *_of_gates(expert)):
            raise BadInput(
                f"the expert of task {expert.about.task!r}: {odd}; use the base that it was made on"
            )


def _of_layers(expert: Expert, modules: Mapping[str, Any]) -> Iterator[str]:
    rank = expert.about.rank
    for name, (down, up) in expert.factors.items():
        layer = modules.get(name)
        if layer is None:
            yield f"it changes layer {name}, which this model lacks"
            continue
        if (widths := _widths(layer)) is None:
            yield f"it changes {name or 'the whole model'}, which is no linear layer ({type(layer).__name__})"
            continue
        found, (d_in, d_out) = (tuple(down.shape), tuple(up.shape)), widths
        if found != (wanted := ((rank, d_in), (d_out, rank))):
            yield f"A and B of {name} are {found[0]} and {found[1]}, not {wanted[0]} and {wanted[1]}"
        yield from _no_numbers(f"A of {name}", down)
        yield from _no_numbers(f"B of {name}", up)


def _of_router(expert: Expert, width: int) -> Iterator[str]:
    vector, residuals = expert.vector, expert.residuals
    if vector.dim() != 1:
        yield f"its vector is {tuple(vector.shape)}, not one row of numbers"
        return
    yield from _no_numbers("its vector", vector)
    if residuals is None:
        if len(vector) not in (0, width):  # a shared expert has none
            yield f"its vector is {tuple(vector.shape)}, the input embeddings are {width} wide"
        return
    if residuals.dim() != 2 or not len(residuals) or residuals.shape[1] != len(vector):
        yield f"its prototype's residuals are {tuple(residuals.shape)} beside a mean of {tuple(vector.shape)}"
    yield from _no_numbers("its prototype", residuals)


def _of_gates(expert: Expert) -> Iterator[str]:
    for name, gate in (expert.gates or {}).items():
        wanted = (2,) if gate.dim() < 2 else (2, expert.factors[name][0].shape[1])
        if tuple(gate.shape) != wanted:
            yield f"the gate of {name} is {tuple(gate.shape)}, not {wanted}"
        yield from _no_numbers(f"the gate of {name}", gate)


def _no_numbers(what: str, value: Tensor) -> Iterator[str]:
    if not value.is_floating_point():
        yield f"{what} holds {value.dtype}, no floating point numbers"
    elif not bool(value.isfinite().all()):
        yield f"{what} holds a number that is not finite"


def _widths(layer: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, under PEFT or not; None of any other layer."""
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if isinstance(layer, Conv1D):  # GPT-2's, whose weight is (d_in, d_out)
        return layer.weight.shape[0], layer.weight.shape[1]
    known = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return (layer.in_features, layer.out_features) if known else None
