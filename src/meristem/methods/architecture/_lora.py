"""The one plain LoRA that is in training, for methods that build on it."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from meristem.errors import Clash
from meristem.methods.base import Context, trainable


def plain_lora(method: str, model: Any) -> tuple[str, list[Any]]:
    """The adapter in training and its layers; ``Clash`` for anything that is not plain LoRA on linear layers."""
    found = [
        (layer, adapter)
        for layer in model.modules()
        for adapter, down in getattr(layer, "lora_A", {}).items()
        if down.weight.requires_grad
    ]
    adapters = {adapter for _, adapter in found}
    if len(adapters) != 1:
        raise Clash(
            f"{method} grows one LoRA, and {len(adapters) or 'none'} is in training: pass a PEFT LoRA model"
        )
    (adapter,) = adapters
    layers = [layer for layer, _ in found]
    config = model.peft_config[adapter]
    linear = [part[adapter] for layer in layers for part in (layer.lora_A, layer.lora_B)]
    ours = {id(part.weight) for part in linear}
    other = next((name for name, p in trainable(model).items() if id(p) not in ours), None)
    problems = {
        "a LoRA on other than linear layers": not all(isinstance(part, nn.Linear) for part in linear),
        f"trainable weights that are no part of a LoRA ({other})": other is not None,
        "layers of different rank": len({layer.r[adapter] for layer in layers}) > 1 or config.alpha_pattern,
        "use_rslora, whose scale changes with the rank": config.use_rslora,
        "a variant of LoRA": any(getattr(layer, "lora_variant", {}).get(adapter) for layer in layers),
    }
    for problem, present in problems.items():
        if present:
            raise Clash(f"{method} works on plain LoRA only, this model has {problem}")
    return adapter, layers


def draw_of(ctx: Context) -> torch.Generator:
    """What fresh rows of A are drawn with: the same for the same seed and task, on any machine."""
    return torch.Generator().manual_seed(random.Random(f"{ctx.seed}/{ctx.task}").getrandbits(62))


def fresh_rows(rank: int, width: int, draw: torch.Generator) -> torch.Tensor:
    """A (rank, width), drawn as PEFT draws it."""
    rows = torch.empty(rank, width)
    nn.init.kaiming_uniform_(rows, a=5**0.5, generator=draw)
    return rows


def grow(down: nn.Linear, up: nn.Linear, rank: int, draw: torch.Generator) -> None:
    """``rank`` more rows of A (r, d_in), drawn, and columns of B (d_out, r), zero."""
    fresh = fresh_rows(rank, down.in_features, draw)
    down.weight = nn.Parameter(torch.cat([down.weight.detach(), fresh.to(down.weight)]))
    up.weight = nn.Parameter(torch.cat([up.weight.detach(), up.weight.new_zeros(up.out_features, rank)], 1))
    down.out_features = up.in_features = len(down.weight)
