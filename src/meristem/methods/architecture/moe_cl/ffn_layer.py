"""One MLP whose forward is the mixture of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meristem.errors import Clash
from meristem.methods.architecture.moe_cl.ffn_experts import Lora, Pair, Turn
from meristem.methods.architecture.moe_cl.ffn_math import Projection, Stack, mixture
from meristem.methods.architecture.moe_cl.ffn_modules import PROJECTIONS, bases_of

if TYPE_CHECKING:
    from meristem.methods.architecture.moe_cl.ffn import FfnMixtures

Three = tuple[Projection, Projection, Projection]
GATE = "moe_cl_gate"  # the parameter's name in its MLP, where it is trained


class FfnLayer:
    """One MLP with its forward replaced."""

    def __init__(self, name: str, mlp: Any, gate: Tensor, whole: FfnMixtures) -> None:
        self.name, self.mlp, self.gate, self.whole = name, mlp, gate, whole
        self.bases, self.plain = bases_of(mlp), mlp.forward
        self._own = mlp.__dict__.get("forward")
        self._device: torch.device | None = None
        self._placed: dict[int, dict[str, Pair]] = {}  # frozen experts by id, on that device
        self._latest: tuple[tuple[int, ...], Three] | None = None
        mlp.forward = self.forward
        if isinstance(gate, nn.Parameter):
            mlp.register_parameter(GATE, gate)

    def remove(self) -> None:
        del self.mlp.forward
        if self._own is not None:
            self.mlp.forward = self._own
        if hasattr(self.mlp, GATE):
            delattr(self.mlp, GATE)

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole.on:
            return self.plain(x)
        turn = self.whole.turn()
        if turn is None:
            gate, up, down = (self.bases[part] for part in PROJECTIONS)
            return down(self.mlp.act_fn(gate(x)) * up(x))
        stack = self._stack(x, turn)
        output, half = mixture(self.mlp.act_fn, stack, turn.gates[self.name].to(x.device), x)
        if self.whole.watching and self.mlp.training:
            self.whole.keep_mean(self.name, stack, half)
        return output

    def _stack(self, x: Tensor, turn: Turn) -> Stack:
        rank = len(turn.shared.factors[f"{self.name}.gate_proj"][0])
        if turn.rows is None:
            assert self.whole.adapter is not None
            return Stack(self._trained(self.whole.adapter), rank, turn.shared.scale)
        rows = turn.rows
        if x.dim() != 3 or len(x) != len(rows.scale):
            raise Clash(
                f"{self.name} sees {tuple(x.shape)} where {len(rows.scale)} rows are routed: route each batch anew"
            )
        return Stack(
            self._joined(rows.loras, x.device), rank, rows.scale.to(x.device), rows.known.to(x.device)
        )

    def _trained(self, adapter: str) -> Three:
        def part(name: str) -> Projection:
            layer = getattr(self.mlp, name)
            if layer.merged:
                raise Clash("FFN-level experts are computed beside the base: unmerge the adapter")
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            return Projection(self.bases[name], down, up, layer.lora_dropout[adapter])

        gate, up, down = map(part, PROJECTIONS)
        return gate, up, down

    def _joined(self, loras: Sequence[Lora], device: torch.device) -> Three:
        """Of these experts one below the other; the latest are kept, for the next batch often has the same."""
        if device != self._device:
            self._device, self._latest = device, None
            self._placed = {id(lora): self._factors(lora, device) for lora in self.whole.frozen}
        key = tuple(map(id, loras))
        if self._latest is not None and self._latest[0] == key:
            return self._latest[1]
        parts = [self._placed.get(id(lora)) or self._factors(lora, device) for lora in loras]

        def whole(name: str) -> Projection:
            downs, ups = zip(*(part[name] for part in parts), strict=True)
            layer, adapter = getattr(self.mlp, name), self.whole.adapter
            dropout = layer.lora_dropout[adapter] if adapter is not None and self.mlp.training else None
            with torch.inference_mode(False):  # what is kept may meet a batch that is trained on
                return Projection(self.bases[name], torch.cat(downs), torch.cat(ups, 1), dropout)

        gate, up, down = map(whole, PROJECTIONS)
        found = gate, up, down
        if all(number in self._placed for number in key):
            self._latest = key, found
        return found

    def _factors(self, lora: Lora, device: torch.device) -> dict[str, Pair]:
        pairs = {part: lora.factors[f"{self.name}.{part}"] for part in PROJECTIONS}
        return {part: (down.to(device), up.to(device)) for part, (down, up) in pairs.items()}
