"""Weights sharded by FSDP2 (``fully_shard``): parameters, gradients and method state are ``DTensor``.

Methods are written for plain tensors. Under :func:`mixing` a plain tensor beside a sharded parameter counts as
replicated, so ``fisher * (theta - anchor)`` works when state was loaded whole. Everything here that gathers is
a collective: every rank calls it, with the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from meristem.methods.base import MethodState


def sharded(tensors: Iterable[Any]) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return any(_is_dtensor(tensor) for tensor in tensors)


def mixing(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
    """Lets plain tensors meet sharded ones; nothing where no tensor is sharded."""
    if not sharded(tensors):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def whole(tensor: Any) -> Any:
    """The full tensor, gathered from all ranks; a plain tensor as it is. Differentiable."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def whole_state(state: MethodState) -> MethodState:
    """A method's state with full tensors, as it is saved and carried to the next update."""
    return {"tensors": {k: whole(v) for k, v in state["tensors"].items()}, "json": state["json"]}


def differentiable(run: Callable[[], Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """``run()`` so that ``torch.autograd.grad`` reaches sharded parameters.

    FSDP2 computes on gathered copies and reduces their gradients into ``param.grad`` in backward hooks; the
    graph itself does not lead to the sharded parameters. The gradient is the mean over ranks, which is the
    gradient of ``run()`` when all ranks ran the same batch.
    """
    if not torch.is_grad_enabled():
        return run()
    loss: Tensor = _ThroughBackward.apply(run, *params.values())
    return loss


class _ThroughBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], *params: Tensor) -> Tensor:
        earlier = [p.grad for p in params]
        for parameter in params:
            parameter.grad = None
        with torch.enable_grad():
            loss = run()
            loss.backward()
        ctx.gradients = [p.grad for p in params]
        for parameter, grad in zip(params, earlier, strict=True):
            parameter.grad = grad
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return (None, *(None if grad is None else grad * upstream[0] for grad in ctx.gradients))


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
