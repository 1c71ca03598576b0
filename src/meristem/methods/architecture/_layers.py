"""What experts add to the output of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
LONG = 8  # tokens of a row from which gathering its experts is less work than a product with everybody's


class FrozenLayer:
    """The frozen experts of one layer, whose tensors stay where they are: a batch joins those that it uses.

    What a row counts stands in *columns* (batch, n), those of the n experts in use, a shared one's first; (batch,
    length, n) where gates look at each token. Where each row has one expert and the rows are long, their experts are
    gathered row by row instead: a batch that mixes tasks then costs what one of a single task does.
    """

    def __init__(
        self, name: str, experts: Mapping[int, Expert], shared: Expert | None, whole: Experts
    ) -> None:
        self.name, self.whole, self.place = name, whole, {at: place for place, at in enumerate(experts)}
        owners = dict(experts)
        if shared is not None and name in shared.factors:
            owners = {_SHARED: shared, **owners}
        self.shared = _SHARED in owners
        self.factors = {at: (e.factors[name][0], e.factors[name][1].T) for at, e in owners.items()}
        self.scale = {at: e.scale for at, e in owners.items()}
        self.gates = stacked_gates(experts.values(), name)
        self._joined: tuple[Any, tuple[Tensor, ...]] | None = None
        self._kept: tuple[Routing, bool, InUse] | None = None

    def add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        routing = self.whole.present()
        if routing is None:
            return output
        x: Tensor = inputs[0]
        used = self._in_use(routing, x)
        if used is None:
            return output
        weights = by_row(used.weights, x, self.name)
        x = x.to(used.down.dtype)
        if used.choice is not None and x.shape[1] >= LONG:
            down, up, weights = used.gathered(used.choice, weights)
            hidden = torch.bmm(x, down.mT)
        else:
            up, hidden = used.up, linear(x, used.down)
        added = (hidden * weights).to(up.dtype) @ up
        # In place: torch takes many times as long to add a half-precision tensor to a float32 one out of place.
        return added.to(torch.promote_types(added.dtype, output.dtype)).add_(output).to(output.dtype)

    def _in_use(self, routing: Routing, x: Tensor) -> InUse | None:
        """None where no expert has a part. Kept while the routing stays, as it does with a cache."""
        shared = self.shared and self.whole.shared_is_frozen()
        if self._kept is not None and self._kept[0] is routing and self._kept[1] == shared:
            return self._kept[2]
        active = tuple(at for at in routing.active if at in self.place)
        if not active and not shared:
            return None
        down, up, scale, column = self._together(active, shared, x.device)
        columns = self._columns(routing, active, shared, x)
        choice, rank = self._choice(routing, active, shared), int((column == 0).sum())
        used = InUse(down, up, columns[..., column] * scale, choice, rank)
        if columns.dim() == 2 and not columns.requires_grad:
            self._kept = routing, shared, used
        return used

    def _columns(self, routing: Routing, active: tuple[int, ...], shared: bool, x: Tensor) -> Tensor:
        given = routing.weights[:, list(active)]
        if self.gates is None:
            return given
        self.gates = self.gates.to(x.device)
        used = [self.place[at] for at in active]
        whole, own = gates.divide(self.gates, used, given, routing.unknown, x)
        return torch.cat([whole[..., None], own], -1) if shared else own

    def _choice(self, routing: Routing, active: tuple[int, ...], shared: bool) -> Tensor | None:
        """(batch, m): of the joined experts those of each row; None where rows blend them, or have no choice."""
        ranks = {len(self.factors[at][0]) for at in self._owners(active, shared)}
        if len(active) < 2 or len(ranks) > 1 or routing.choice is None:
            return None
        place = {at: n for n, at in enumerate(active, start=int(shared))}
        own = [place.get(at, int(shared)) for at in routing.choice]  # of none here: any, which counts 0
        rows = [[0, at] if shared else [at] for at in own]
        return torch.tensor(rows, device=routing.weights.device)

    def _together(self, active: tuple[int, ...], shared: bool, device: torch.device) -> tuple[Tensor, ...]:
        """A (R, d_in), B^T (R, d_out), and of each of the R rows its scale and its column.

        Kept for the next batch, which often has the same; an expert alone is not copied.
        """
        if self._joined is None or self._joined[0] != (active, shared, device):
            with torch.inference_mode(False):  # what is kept may meet a batch that is trained on
                self._joined = (active, shared, device), self._join(active, shared, device)
        return self._joined[1]

    def _join(self, active: tuple[int, ...], shared: bool, device: torch.device) -> tuple[Tensor, ...]:
        owners = self._owners(active, shared)
        for at in owners:
            down, up = self.factors[at]
            self.factors[at] = down.to(device), up.to(device)
        downs, ups = zip(*(self.factors[at] for at in owners), strict=True)
        down, up = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (downs, ups))
        ranks = torch.tensor([len(part) for part in downs])
        exact = torch.promote_types(down.dtype, torch.float32)
        scale = torch.tensor([self.scale[at] for at in owners], dtype=exact).repeat_interleave(ranks)
        column = torch.arange(len(owners)).repeat_interleave(ranks)
        return down, up, scale.to(device), column.to(device)

    @staticmethod
    def _owners(active: tuple[int, ...], shared: bool) -> list[int]:
        return [*([_SHARED] if shared else []), *active]


@dataclass(frozen=True)
class InUse:
    """Of the experts that a batch uses in one layer: A (R, d_in), B^T (R, d_out) of all of them joined.

    ``weights`` (batch, R), by token (batch, length, R). ``choice`` (batch, m): which m of the experts, then of one
    rank, a row has; all others count nothing there.
    """

    down: Tensor
    up: Tensor
    weights: Tensor
    choice: Tensor | None
    rank: int  # of the first of them

    def gathered(self, choice: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's own A (batch, m r, d_in), B^T (batch, m r, d_out), and of ``weights`` (batch, length or 1, R)."""
        experts, rows = (-1, self.rank), (len(choice), choice.shape[1] * self.rank, -1)
        down, up = (
            part.unflatten(0, experts).index_select(0, choice.flatten()).view(rows)
            for part in (self.down, self.up)
        )
        each = weights.unflatten(-1, experts)
        return down, up, each.take_along_dim(choice[:, None, :, None], 2).flatten(2)


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
