"""What experts add to the output of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from meristem.errors import Clash
from meristem.methods.architecture import gates
from meristem.methods.architecture.routing import Routing

if TYPE_CHECKING:
    from meristem.methods.architecture.experts import Expert, Experts, Newest

_SHARED = -1


class FrozenLayer:
    """The frozen experts of one layer: A (R, d_in), B^T (R, d_out), and of each of the R rows its owner and scale.

    The rows of a shared expert come first. What a row counts stands in one of the *columns* (batch, 1 + n), the shared
    expert's and those of the n experts in use; (batch, length, 1 + n) where gates look at each token.
    """

    def __init__(
        self, name: str, experts: Mapping[int, Expert], shared: Expert | None, whole: Experts
    ) -> None:
        self.name, self.whole, self.at = name, whole, tuple(experts)
        owners = dict(experts)
        if shared is not None and name in shared.factors:
            owners = {_SHARED: shared, **owners}
        parts = list(owners.values())
        self.down = torch.cat([part.factors[name][0] for part in parts])
        self.up = torch.cat([part.factors[name][1].T for part in parts])
        exact = torch.promote_types(self.down.dtype, torch.float32)
        ranks = torch.tensor([part.about.rank for part in parts])
        self.owner = torch.tensor(list(owners)).repeat_interleave(ranks)
        self.scale = torch.tensor([part.scale for part in parts], dtype=exact).repeat_interleave(ranks)
        self.shared = _SHARED in owners
        self.gates = stacked_gates(experts.values(), name)
        self._chosen: tuple[Any, tuple[Tensor, ...]] | None = None
        self._counted: tuple[Any, Routing, Tensor] | None = None

    def add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        routing = self.whole.present()
        if routing is None:
            return output
        active = tuple(at for at in self.at if at in routing.active)
        shared = self.shared and self.whole.shared_is_frozen()
        if not active and not shared:
            return output
        down, up, scale, column = self._of(active, shared, output.device)
        weights = self._weights(routing, active, shared, inputs[0])[..., column] * scale
        hidden = linear(inputs[0].to(down.dtype), down)
        hidden = (hidden * by_row(weights, hidden, self.name)).to(up.dtype)
        return (output + hidden @ up).to(output.dtype)

    def _weights(self, routing: Routing, active: tuple[int, ...], shared: bool, x: Tensor) -> Tensor:
        """The columns; those that no token decides are kept while the routing stays, as it does with a cache."""
        given = routing.weights[:, list(active)]
        if self.gates is None:
            return given
        if self._counted is not None and self._counted[0] == (active, shared) and self._counted[1] is routing:
            return self._counted[2]
        self.gates = self.gates.to(x.device)
        used = [self.at.index(at) for at in active]
        whole, own = gates.divide(self.gates, used, given, routing.unknown, x)
        found = torch.cat([whole[..., None], own], -1) if shared else own
        if self.gates.dim() == 2 and not found.requires_grad:
            self._counted = (active, shared), routing, found
        return found

    def _of(self, active: tuple[int, ...], shared: bool, device: torch.device) -> tuple[Tensor, ...]:
        """The rows in use, and the column of each; kept for the next batch, which often has the same."""
        if self.down.device != device:
            self.down, self.up, self.owner, self.scale = (
                part.to(device) for part in (self.down, self.up, self.owner, self.scale)
            )
            self._chosen = None
        if self._chosen is None or self._chosen[0] != (active, shared):
            owners = [*([_SHARED] if shared else []), *active]
            rows = torch.isin(self.owner, torch.tensor(owners, device=device)).nonzero()[:, 0]
            column = torch.searchsorted(torch.tensor(owners, device=device), self.owner[rows])
            parts = self.down, self.up, self.scale
            first, last = int(rows[0]), int(rows[-1]) + 1
            if last - first == len(rows):  # they stand together: nothing is copied
                chosen = tuple(part[first:last] for part in parts)
            else:
                chosen = tuple(part[rows] for part in parts)
            self._chosen = (active, shared), (*chosen, column)
        return self._chosen[1]


class NewestLayer:
    """Scales the codes A x of the adapter in training in one layer, as the routing and the gates say."""

    def __init__(self, at: int, name: str, newest: Newest, frozen: list[Expert], whole: Experts) -> None:
        self.at, self.name, self.newest, self.whole = at, name, newest, whole
        self.frozen = stacked_gates(frozen, name)

    def scale(self, module: Any, inputs: Any, codes: Tensor) -> Tensor:
        routing = self.whole.present()
        if routing is None:
            return torch.zeros_like(codes)
        if self.newest.observe is not None:
            self.newest.observe(self.at, codes)
        if self.newest.gates is None:
            if routing.newest_alone:
                return codes
            weights = routing.weights[:, -1:]
        else:
            shared = self.newest.shared
            ranks = torch.tensor([shared, codes.shape[-1] - shared], device=codes.device)
            weights = self._divided(routing, inputs[0]).repeat_interleave(ranks, -1)
        return (codes * by_row(weights, codes, "the adapter")).to(codes.dtype)

    def _divided(self, routing: Routing, x: Tensor) -> Tensor:
        """(batch or 1, 2), by token (batch, length, 2): what the shared and the newest expert count."""
        assert self.newest.gates is not None
        own = self.newest.gates.of(self.name)[None]
        if routing.newest_alone:
            found = gates.shares(own, x)
            return found if found.dim() == 2 else found[..., 0, :]
        known = own if self.frozen is None else torch.cat([self.frozen.to(own), own])
        used = [*routing.active, len(known) - 1]
        whole, each = gates.divide(known, used, routing.weights[:, used], routing.unknown, x)
        return torch.stack([whole, each[..., -1]], -1)


def stacked_gates(experts: Any, name: str) -> Tensor | None:
    """(experts, 2), by token (experts, 2, d_in), in at least float32; None without gates."""
    found = [expert.gates[name] for expert in experts if expert.gates is not None]
    return (
        torch.stack([gate.to(torch.promote_types(gate.dtype, torch.float32)) for gate in found])
        if found
        else None
    )


def by_row(weights: Tensor, value: Tensor, where: str) -> Tensor:
    """Weights (batch or 1, R), or by token (batch, length, R), beside a value (batch, length, R)."""
    if value.dim() != 3 or len(weights) not in (1, len(value)):
        raise Clash(
            f"{where} sees {tuple(value.shape)} where rows of {len(weights)} prompts are routed: "
            "train experts on layers that keep rows apart (not inside a mixture of experts)"
        )
    return weights if weights.dim() == 3 else weights[:, None, :]
