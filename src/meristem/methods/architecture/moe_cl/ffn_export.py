"""Plain LoRAs in the place of FFN-level experts, as near as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meristem.errors import BadInput
from meristem.methods.architecture.experts import Expert
from meristem.methods.architecture.moe_cl.distill import Distilled, distill
from meristem.methods.architecture.moe_cl.ffn_experts import Lora, Pair
from meristem.methods.architecture.moe_cl.ffn_math import task_share
from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts


@dataclass(frozen=True)
class _Joined:
    """The shared and a task's expert as one LoRA, the gates at their means: exact but for activation and tokens."""

    factors: Mapping[str, Pair]
    scale: float


def distill_expert(
    experts: FfnExperts,
    task: str,
    rows: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    **options: Any,
) -> Distilled:
    """One plain LoRA of rank 2r (or ``rank``) for ``task``, fitted to what the experts of a loaded version answer.

    It starts from A = [A_0; A_t], B = [g_0 B_0, g_t B_t], the gates' means over the tokens of ``rows``. Rows, options and
    what is raised: ``distill``. ``Distilled.fit`` says how far it stays from the experts on ``held_out``.
    """
    if experts.newest is not None:
        raise BadInput("distillation is of a version's experts: load the version, none may be in training")
    place, pinned = experts.place_of(task), experts.pin
    experts.pin = place

    def teacher(batch: dict[str, Tensor]) -> Tensor:
        with experts.mixtures.switched(True):
            return experts.model(**batch, use_cache=False).logits

    try:
        start = _start(experts, experts.frozen[place], rows)
        with experts.mixtures.switched(False):
            return distill(experts.model, teacher, rows, held_out, start, **options)
    finally:
        experts.pin = pinned


def _start(experts: FfnExperts, expert: Expert, rows: Sequence[Mapping[str, Any]]) -> Lora:
    shares, shared = _mean_shares(experts, rows), experts.shared
    assert shared is not None
    factors = {}
    for name, (down, up) in expert.factors.items():
        first, common = shared.factors[name]
        share = shares[name.rpartition(".")[0]]
        up = torch.cat([(1 - share) * shared.scale / expert.scale * common, share * up], 1)
        factors[name] = torch.cat([first, down]), up
    return _Joined(factors, expert.scale)


@torch.no_grad()
def _mean_shares(experts: FfnExperts, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Name of an MLP -> mean of g_t over the tokens of ``rows``, one row at a time."""
    sums = dict.fromkeys(experts.mixtures.layers, 0.0)

    def add(name: str, x: Tensor) -> None:
        gate = experts.mixtures.gates[name]
        sums[name] += float(task_share(gate.to(x.device), x).sum())

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, layer in experts.mixtures.layers.items()
    ]
    device = next(experts.model.parameters()).device
    training = experts.model.training
    experts.model.eval()
    try:
        for row in rows:
            experts.model(input_ids=torch.tensor([row["input_ids"]], device=device), use_cache=False)
    finally:
        experts.model.train(training)
        for hook in hooks:
            hook.remove()
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {name: value / max(tokens, 1) for name, value in sums.items()}
