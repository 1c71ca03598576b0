"""The gated MLPs of a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meristem.errors import Clash

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def ffn_modules(model: Any) -> dict[str, Any]:
    """Full name -> gated MLP of every block of a causal ``model`` (not its PEFT wrapper).

    ``Clash`` where there is none, or one that computes anything else than W2(act(W1 x) * W3 x) of each token.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, part) for part in (*PROJECTIONS, "act_fn"))
    }
    kind = type(model).__name__
    if not found:
        raise Clash(
            f"{kind} has no MLP of {', '.join(PROJECTIONS)} and act_fn, which FFN-level experts are made of: use a "
            "model of the Llama, Qwen or Mistral family, or experts on projections"
        )
    seen: set[type] = set()
    for name, mlp in found.items():
        one_of_many = name.rsplit(".", 1)[-1].isdigit()  # a mixture of experts gives it some of the tokens
        if type(mlp) not in seen and (one_of_many or not _is_plain(mlp)):
            raise Clash(
                f"{kind}: {name} ({type(mlp).__name__}) is no plain gated MLP, down(act(gate x) * up x) for every "
                "token, so FFN-level experts cannot stand in for it: use experts on projections"
            )
        seen.add(type(mlp))
    return found


def bases_of(mlp: Any) -> dict[str, nn.Module]:
    """The three linear layers without PEFT's LoRA."""
    layers = {part: getattr(mlp, part) for part in PROJECTIONS}
    return {
        part: layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        for part, layer in layers.items()
    }


def widths_of(mlp: Any) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the three."""
    return {part: (layer.in_features, layer.out_features) for part, layer in bases_of(mlp).items()}


@torch.no_grad()
def _is_plain(mlp: Any) -> bool:
    """Tried on two tokens: some families scale or clip inside the same parts."""
    bases = bases_of(mlp)
    if any(not hasattr(layer, "in_features") for layer in bases.values()):
        return False
    width = widths_of(mlp)["gate_proj"][0]
    weight = next(bases["gate_proj"].parameters())
    kind = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    x = torch.linspace(-2, 2, 2 * width, device=weight.device).to(kind).view(1, 2, width)
    training = [module for module in mlp.modules() if module.training]
    for module in training:
        module.training = False
    try:
        ours, theirs = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), mlp(x)
    finally:
        for module in training:
            module.training = True
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return bool((ours - theirs).float().norm() <= 1e-2 * ours.float().norm())
