"""Which base a set of weights was trained on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


@torch.no_grad()
def base_digest(model: Any) -> str:
    """SHA-256 over the names, shapes and values of the causal ``model``'s own weights, without adapters.

    Values are rounded to bfloat16 first: the same base loaded in another precision is the same base.
    """
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "lora_" in name or name.startswith("expert_"):
            continue
        found.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
        rounded = value.to(torch.bfloat16) if value.is_floating_point() else value
        found.update(rounded.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return f"sha256:{found.hexdigest()}"
