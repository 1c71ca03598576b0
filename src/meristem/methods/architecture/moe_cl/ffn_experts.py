"""What an FFN-level expert is, frozen or as one half of the adapter in training, and which rows have which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meristem.errors import Clash
from meristem.methods.architecture.moe_cl.ffn_modules import PROJECTIONS

Pair = tuple[Tensor, Tensor]


class Lora(Protocol):
    """One expert. ``factors``: full name of a projection -> A (r, d_in), B (d_out, r); ``scale`` = alpha / r."""

    @property
    def factors(self) -> Mapping[str, Pair]: ...

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Before:
    """The shared expert and the gates from before the present training, of which the adapter holds later values."""

    shared: Lora
    gates: Mapping[str, Tensor]


class AdapterHalf(Mapping[str, Pair]):
    """The shared (``newest`` False) or the newest expert in a PEFT adapter of rank 2r, as it is at the moment.

    ``modules``: full name -> MLP. ``Clash`` for an adapter that cannot hold two experts of each.
    """

    def __init__(self, modules: Mapping[str, Any], adapter: str, newest: bool) -> None:
        self._layers = {
            f"{name}.{part}": getattr(mlp, part) for name, mlp in modules.items() for part in PROJECTIONS
        }
        for name, layer in self._layers.items():
            if adapter not in getattr(layer, "lora_A", {}):
                raise Clash(
                    f"FFN-level experts need the adapter {adapter!r} on {name}: target_modules={[*PROJECTIONS]}"
                )
        ranks = {layer.r[adapter] for layer in self._layers.values()}
        if len(ranks) != 1 or next(iter(ranks)) % 2:
            raise Clash(
                f"the shared and the task's expert share a rank of 2r: make it even and one, not {sorted(ranks)}"
            )
        self._adapter = adapter
        rank = ranks.pop() // 2
        self._part = slice(rank, None) if newest else slice(rank)
        self.scale = float(next(iter(self._layers.values())).scaling[adapter])

    @property
    def factors(self) -> Mapping[str, Pair]:
        return self

    def __getitem__(self, name: str) -> Pair:
        layer = self._layers[name]
        down, up = (part[self._adapter].weight for part in (layer.lora_A, layer.lora_B))
        return down[self._part], up[:, self._part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Rows:
    """Which expert each row of a batch has, as a ``Stack`` wants it: ``scale`` (batch, 1, R), ``known`` (batch, 1, 1).

    From ``weights`` (batch, experts), 1 for the one that a row has, and the experts ``used``, those that some row may have.
    ``loras``: the shared one and those.
    """

    def __init__(self, weights: Tensor, used: Sequence[int], experts: Sequence[Lora], shared: Lora) -> None:
        self.loras = [shared, *(experts[at] for at in used)]
        downs = [next(iter(lora.factors.values()))[0] for lora in self.loras]
        exact = torch.promote_types(downs[0].dtype, torch.float32)
        weights = weights.to(exact)
        each = torch.cat([torch.ones_like(weights[:, :1]), weights[:, list(used)]], 1)
        each = each * torch.tensor([lora.scale for lora in self.loras], dtype=exact, device=each.device)
        column = torch.tensor([at for at, down in enumerate(downs) for _ in down], device=each.device)
        self.scale, self.known = each[:, None, column], weights.sum(1)[:, None, None]


@dataclass(frozen=True)
class Turn:
    """What a forward is computed by. ``rows`` None: the two experts of the adapter in training, for every row."""

    shared: Lora
    gates: Mapping[str, Tensor]
    rows: Rows | None
