"""Copies of the trained weights, for methods that keep one: taking, checking, swapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from meristem.errors import BadInput
from meristem.methods.base import Params


def snapshot(params: Params) -> dict[str, Tensor]:
    """A copy of each parameter in its own dtype, on its own device."""
    return {name: p.detach().clone() for name, p in params.items()}


@contextmanager
def swapped(params: Params, values: Mapping[str, Tensor]) -> Iterator[None]:
    """``params`` hold ``values`` inside the block; pointers are exchanged, so no byte moves and autograd sees nothing."""
    kept = {name: params[name].data for name in values}
    try:
        for name, value in values.items():
            params[name].data = value
        yield
    finally:
        for name, value in kept.items():
            params[name].data = value


def named(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` as tensors of a method state, on the CPU, under ``prefix.NAME``."""
    return {f"{prefix}.{name}": value.detach().cpu().clone() for name, value in values.items()}


def taken(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the values that ``named`` gave, out of a method state that stays the caller's."""
    start = prefix + "."
    return {
        name.removeprefix(start): value.clone() for name, value in tensors.items() if name.startswith(start)
    }


def check_fits(method: str, saved: Mapping[str, Tensor], params: Params) -> None:
    """``BadInput`` when ``saved`` is not of these parameters."""
    for name in saved.keys() ^ params.keys() if saved else ():
        raise BadInput(
            f"{method}: the saved state is for another set of trainable parameters ({name} is only on one side): "
            "keep the adapter's shape and name"
        )
    for name, value in saved.items():
        if value.shape != params[name].shape:
            raise BadInput(
                f"{method}: the saved state is for another set of trainable parameters ({name} is "
                f"{tuple(value.shape)} there, {tuple(params[name].shape)} here): keep the adapter's shape and name"
            )


@torch.no_grad()
def interpolate(params: Params, start: Mapping[str, Tensor], share: float) -> None:
    """theta <- start + share (theta - start), in at least fp32, rounded once."""
    for name, p in params.items():
        exact = torch.promote_types(p.dtype, torch.float32)
        p.copy_(torch.lerp(start[name].to(p.device, exact), p.to(exact), share))
