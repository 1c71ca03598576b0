"""FFN-level experts on a causal language model: every gated MLP as the mixture of ``ffn_math``.

An expert's LoRA passes through the activation together with the base, so that experts cannot be added up: a row has
one task expert or none. Rows of one batch may have different ones, and only those that some row has are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from meristem.errors import BadInput, Clash
from meristem.methods.architecture.moe_cl.ffn_experts import AdapterHalf, Before, Lora, Rows, Turn
from meristem.methods.architecture.moe_cl.ffn_layer import FfnLayer
from meristem.methods.architecture.moe_cl.ffn_math import SharedHalf, Stack, shared_mean, shared_output
from meristem.methods.architecture.moe_cl.ffn_modules import PROJECTIONS, ffn_modules, widths_of
from meristem.methods.architecture.routing import Routing

_PLACE = "_meristem_ffn_mixtures"


class FfnMixtures:
    """Stands in for the forward of each MLP named in ``gates``, until :meth:`remove`.

    ``gates``: full name of an MLP -> W_g (2, d), trained where it is a parameter (registered in the MLP). The shared
    expert and the newest task's are in training in one PEFT LoRA ``adapter`` of rank 2r on the three projections,
    A = [A_0; A_t], B = [B_0, B_t]; without ``adapter`` the ``shared`` one is given. ``experts`` are frozen and
    numbered from 0; the newest has the number after them.

    Which row has which is what ``router()`` says of the forward under way (weights 0 or 1; None: the base alone). Without
    ``router`` every row has the newest in training mode, and in eval mode :meth:`route` says it; the positions of a
    forward do not matter, so that a cache of keys and values makes no difference. With the adapter off the model is that
    of ``before`` with the frozen experts, where rows of the newest have the shared one alone, or without it the base.

    Raises ``Clash`` for a model, adapter or batch that this cannot be done on, ``BadInput`` for experts of another base.
    """

    def __init__(
        self,
        model: Any,
        gates: Mapping[str, Tensor],
        *,
        adapter: str | None = None,
        shared: Lora | None = None,
        experts: Sequence[Lora] = (),
        before: Before | None = None,
        router: Callable[[], Routing | None] | None = None,
    ) -> None:
        if (adapter is None) == (shared is None):
            raise BadInput("FfnMixtures needs either adapter (in training) or shared (frozen)")
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if (attached := getattr(self.model, _PLACE, None)) is not None:
            attached.remove()
        modules = ffn_modules(self.model)
        self.frozen = [*experts, *([shared] if shared else []), *([before.shared] if before else [])]
        _refuse_misfits(modules, gates, self.frozen)
        self.adapter, self.before, self.experts = adapter, before, list(experts)
        if shared is not None:
            self.shared = shared
        elif adapter is not None:
            named = {name: modules[name] for name in gates}
            self.shared = AdapterHalf(named, adapter, newest=False)
            self.experts.append(AdapterHalf(named, adapter, newest=True))
        self.on, self.watching = True, False  # watching: for shared_means
        self.gates, self.router = dict(gates), router
        self._routing: Routing | None = None
        self._latest: tuple[int, bool, Turn, Routing] | None = None
        self._any = next(iter(modules.values())).gate_proj
        self._masks: dict[bool, Tensor | None] = {}  # of the latest forward in training and in eval mode
        self.leaving: list[Callable[[], None]] = []  # called by remove
        self._means: dict[str, tuple[Stack, Tensor, Tensor]] = {}
        self._under_way, self._batches = False, 0
        self.layers = {name: FfnLayer(name, modules[name], gate, self) for name, gate in gates.items()}
        self._backbone = getattr(self.model, "base_model", self.model)
        self._hooks = [
            self._backbone.register_forward_pre_hook(self._on_forward, with_kwargs=True),
            self._backbone.register_forward_hook(self._after_forward, always_call=True),
        ]
        setattr(self.model, _PLACE, self)

    def remove(self) -> None:
        """Every MLP computes as before, and has no parameters but its own."""
        for leave in self.leaving:
            leave()
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.remove()
        delattr(self.model, _PLACE)

    def route(self, owners: Sequence[int | None] | None) -> None:
        """From here on row n of every batch has expert ``owners[n]``, or the shared one alone where that is None.

        ``owners`` None: all rows have the one in training.
        """
        self._routing = None
        if owners is None:
            return
        count = len(self.experts)
        if (bad := next((o for o in owners if o is not None and not 0 <= o < count), None)) is not None:
            raise BadInput(f"there is no expert {bad}: the {count} there are have the numbers from 0 on")
        weights = torch.tensor([[float(owner == at) for at in range(count)] for owner in owners])
        weights = weights.reshape(len(owners), count).to(next(self.model.parameters()).device)
        known = count - (self.adapter is not None)
        self._routing = Routing(weights, tuple(sorted({o for o in owners if o is not None and o < known})))

    def turn(self) -> Turn | None:
        """What the forward under way is computed by; None for the base alone."""
        off = self.adapter is not None and bool(self._any.disable_adapters)
        if off and self.before is None:
            return None
        routing = self.router() if self.router is not None else self._routing
        if routing is None and self.router is not None:
            return None
        training = self.adapter is not None and not off
        alone = self.router is None and (routing is None or self._backbone.training)
        if training and (alone or (routing is not None and routing.newest_alone)):
            return Turn(self.shared, self.gates, None)
        if routing is None:
            raise Clash("FFN-level experts ran before their rows were routed: call route() first")
        if self._latest is None or self._latest[:2] != (id(routing), off):
            self._latest = id(routing), off, self._turn(routing, off), routing
        return self._latest[2]

    def _turn(self, routing: Routing, off: bool) -> Turn:
        side = self.before if off and self.before is not None else self
        newest = [len(self.experts) - 1] if self.adapter is not None else []
        used = [*routing.active, *([] if off else newest)]
        weights = routing.weights[:, : len(self.experts) - len(newest)] if off else routing.weights
        return Turn(side.shared, side.gates, Rows(weights, used, self.experts, side.shared))

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Inside, and in a backward pass inside, every MLP is the mixture, or with ``on`` False what it was before."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    # ---- the mean of the shared expert's output, for an adversary -----------------------------------------

    def shared_means(self) -> dict[str, Tensor]:
        """Name of an MLP -> mean of E_0(x) (batch, d) over the real tokens of the latest forward in training mode.

        Once for each forward, and only where ``watching`` was True. ``Clash`` where that forward kept no graph.
        """
        kept, self._means = self._means, {}
        if torch.is_grad_enabled() and any(not hidden.requires_grad for _, hidden, _ in kept.values()):
            raise Clash(
                "the shared expert's output has no gradient under reentrant gradient checkpointing: "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return {name: shared_output(*parts) for name, parts in kept.items()}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Forwards inside are on one labelled batch; a batch inside another leaves the outer's means alone.

        ``Clash`` for an inner one with gradients under gradient checkpointing: the layers run again in the backward
        pass would average over the wrong batch's tokens.
        """
        means, masks = self._means, dict(self._masks)
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if self._batches and self.watching and torch.is_grad_enabled() and checkpointing:
            raise Clash(
                "a method's loss on a batch of its own, beside an adversary of the shared expert and under gradient "
                "checkpointing, would mix up their tokens: gradient_checkpointing=False"
            )
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            if self._batches:
                self._means, self._masks = means, masks

    def _on_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        if self.watching and module.training:
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
                raise Clash("an adversary of the shared expert needs an attention mask (batch, length)")
            self._means = {}
        self._masks[module.training] = mask
        self._under_way = True

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        self._under_way = False

    def keep_mean(self, name: str, stack: Stack, half: SharedHalf) -> None:
        """For :meth:`shared_means`. In a backward pass that runs layers again it is computed alike, but not kept."""
        mask = self._masks.get(True)
        mask = half.hidden.new_ones(half.hidden.shape[:2]) if mask is None else mask.to(half.hidden.device)
        means = shared_mean(half, mask)
        if self._under_way:
            self._means[name] = stack, *means


def _refuse_misfits(modules: Mapping[str, Any], gates: Mapping[str, Tensor], loras: Sequence[Lora]) -> None:
    """``BadInput`` where gates or experts are not of this base."""
    remedy = "use the base that it was made on"
    wanted: dict[str, tuple[int, int]] = {}
    for name, gate in gates.items():
        if name not in modules:
            raise BadInput(f"there is a gate for {name}, which is no MLP of this model; {remedy}")
        widths = widths_of(modules[name])
        wanted |= {f"{name}.{part}": widths[part] for part in PROJECTIONS}
        if gate.shape != (2, width := widths["gate_proj"][0]):
            raise BadInput(f"the gate of {name} is {tuple(gate.shape)}, not {(2, width)}; {remedy}")
    for lora in loras:
        if odd := lora.factors.keys() ^ wanted.keys():
            raise BadInput(f"an expert and the gates differ in {sorted(odd)[0]}; {remedy}")
        rank = len(next(iter(lora.factors.values()))[0])
        for name, (d_in, d_out) in wanted.items():
            found = tuple(tuple(factor.shape) for factor in lora.factors[name])
            if found != ((rank, d_in), (d_out, rank)):
                raise BadInput(
                    f"A and B of {name} are {found[0]} and {found[1]}, not {(rank, d_in)} and {(d_out, rank)}; {remedy}"
                )
