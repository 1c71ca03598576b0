"""What the seam hangs on a trainer and on its model for as long as training runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from meristem.methods.base import Method
from meristem.training import _sharding


def replacing_first(methods: Sequence[Method]) -> list[Method]:
    """What replaces the architecture, then the weights; the others hold on to the weights that they find."""
    return sorted(methods, key=lambda m: (not m.replaces_architecture, not m.serves_other_weights))


def served_last(methods: Sequence[Method]) -> list[Method]:
    """What the version serves is made of weights that no other method goes on to edit, or takes for its own."""
    return sorted(methods, key=lambda m: m.serves_other_weights)


@contextmanager
def hidden_states(backbone: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands the last hidden states of every forward with a gradient to ``keep``; leaves no hook on the model."""

    def catch(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            keep(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = backbone.register_forward_hook(catch)
    try:
        yield
    finally:
        handle.remove()


class WeightsCallback(TrainerCallback):
    """Calls ``weights`` right after the optimizer step, with a copy from before it only if declared."""

    def __init__(self, methods: Sequence[Method], parameters: Callable[[], Mapping[str, Any]]):
        self.active = [m for m in served_last(methods) if m.overrides("weights")]
        self.parameters = parameters
        self.before: dict[str, Tensor] | None = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if any(m.needs_before for m in self.active):
            self.before = {name: p.detach().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        params = self.parameters()
        with _sharding.mixing(params.values()):
            for method in self.active:
                method.weights(params, self.before if method.needs_before else None)
        self.before = None


def add_gradient(value: Tensor, params: Sequence[Tensor]) -> None:
    """``param.grad += d value / d param``; not ``backward()``, so that DDP's reducer hooks stay out of it."""
    live = [p for p in params if p.requires_grad]
    for parameter, grad in zip(live, torch.autograd.grad(value, live, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
