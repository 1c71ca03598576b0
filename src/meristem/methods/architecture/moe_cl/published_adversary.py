"""The discriminators of the published MoE-CL: one a layer, in one optimizer with what they play against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from meristem.errors import BadInput
from meristem.methods.architecture.moe_cl.ffn import FfnMixtures

DISCRIMINATOR = "moe_cl_discriminator"  # the parameter's name in its MLP


class Discriminators:
    """D_l (K, d) of every MLP l tells the task from the mean of the shared expert's output, which learns to hide it.

    With m_l the mean over a row's real tokens of E_0(x) in MLP l, and i the index of the row's task among K,

        L_aux = mean over l and rows of -log softmax(D_l m_l)_i          L = L_task - weight L_aux

    The gradient that D_l itself gets from L is reversed, so that one descent on L lowers L_aux in D and raises it in all
    else. ``softmax_twice``: as the authors' program has it, log softmax(softmax(D_l m_l)), which bounds L_aux to a narrow band
    (for K = 4 to [0.74, 1.75]) and makes its gradients weak.

    ``heads``: full name of an MLP -> D_l, a parameter, registered in the MLP until the mixtures are removed. Source: arXiv 2509.18133.
    """

    def __init__(
        self,
        mixtures: FfnMixtures,
        heads: Mapping[str, nn.Parameter],
        weight: float = 0.1,
        softmax_twice: bool = False,
    ) -> None:
        self.mixtures, self.heads = mixtures, dict(heads)
        self.weight, self.softmax_twice = weight, softmax_twice
        for name, layer in mixtures.layers.items():
            width = layer.gate.shape[1]
            if name not in heads or heads[name].dim() != 2 or heads[name].shape[1] != width:
                found = tuple(heads[name].shape) if name in heads else "none"
                raise BadInput(f"the discriminator of {name} must be (tasks, {width}), not {found}")
        self._hooks = [head.register_hook(torch.neg) for head in self.heads.values()]
        for name, head in self.heads.items():
            mixtures.layers[name].mlp.register_parameter(DISCRIMINATOR, head)
        mixtures.watching = True
        mixtures.leaving.append(self._remove)

    def _remove(self) -> None:
        self.mixtures.watching = False
        for hook in self._hooks:
            hook.remove()
        for name in self.heads:
            delattr(self.mixtures.layers[name].mlp, DISCRIMINATOR)

    def loss(self, tasks: Tensor) -> Tensor:
        """-weight L_aux of the latest forward in training mode; ``tasks`` (batch) are indices below K."""
        terms = [
            self._cross_entropy(name, mean, tasks) for name, mean in self.mixtures.shared_means().items()
        ]
        return -self.weight * torch.stack([term.to(tasks.device) for term in terms]).mean()

    def _cross_entropy(self, name: str, mean: Tensor, tasks: Tensor) -> Tensor:
        head = self.heads[name]
        scores = linear(mean.to(head.dtype), head)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return cross_entropy(scores.softmax(-1) if self.softmax_twice else scores, tasks.to(scores.device))
