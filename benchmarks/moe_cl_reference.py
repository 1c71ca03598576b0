"""MoE-CL's default preset as one would first write it: the reference of its step time, in plain PyTorch and TRL.

In each layer every expert is a whole layer, base product included, and the gates weigh their outputs:

    y = g_s (W x + s B_0 A_0 x) + g_t (W x + s B_t A_t x)        [g_s, g_t] = softmax(rate * theta)

Each layer has a discriminator of its own on the mean of its shared output s B_0 A_0 x over a row's tokens, in the
main graph (so that its gradient reaches the layers below too, which ours stops); old tasks are sampled
and the shared expert is held to its old outputs layer by layer. Outputs and both terms equal ours
(``tests/methods/test_moe_cl_speed.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from trl import SFTTrainer

from meristem.methods.architecture.moe_cl.codes import CodeStatistics
from meristem.methods.architecture.task_experts import experts_in, shared_in


class TwoBranches(nn.Module):
    """A linear ``base`` with a shared expert (A_0 frozen) and a task's own beside it, and their gates."""

    def __init__(
        self,
        base: nn.Module,
        shared: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        logits: Tensor,
        scale: float,
        rate: float,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.rate = base, scale, rate
        self.register_buffer("shared_down", shared[0].clone())
        self.shared_up = nn.Parameter(shared[1].clone())
        self.own_down, self.own_up = (nn.Parameter(part.clone()) for part in own)
        self.theta = nn.Parameter(logits / rate)
        self.shared_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.shared_output = self.scale * linear(linear(x, self.shared_down), self.shared_up)
        shared = self.base(x) + self.shared_output
        own = self.base(x) + self.scale * linear(linear(x, self.own_down), self.own_up)
        gates = (self.rate * self.theta).softmax(-1)
        return (gates[0] * shared + gates[1] * own).to(x.dtype)


class Game:
    """Discriminators and anchor of ``layers``, from the state that moe-cl left after its old tasks."""

    def __init__(
        self, layers: Sequence[TwoBranches], seen: Sequence[CodeStatistics], shares: Tensor, rate: float
    ):
        """``shares`` (tasks, layers): the g_s of the old tasks."""
        self.layers, self.seen = list(layers), list(seen)
        like = self.layers[0].shared_up
        self.before = [layer.shared_up.detach().clone() for layer in layers]
        self.discriminators = [
            nn.Linear(len(layer.shared_up), len(seen) + 1).to(like) for layer in self.layers
        ]
        for each in self.discriminators:
            nn.init.zeros_(each.weight)
            nn.init.zeros_(each.bias)
        self.optimizer = torch.optim.Adam([p for d in self.discriminators for p in d.parameters()], lr=rate)
        self.sigma = [
            sum(one.moment[at].to(like) * shares[task, at] ** 2 for task, one in enumerate(seen))
            for at in range(len(self.layers))
        ]
        energies = [(up @ sigma @ up.T).trace() for up, sigma in zip(self.before, self.sigma, strict=True)]
        self.energies = [energy + sum(energies) / len(energies) / 100 for energy in energies]

    def pooled(self, mask: Tensor) -> list[Tensor]:
        """(rows, d_out) of each layer: the mean shared output over a row's real tokens."""
        weights = mask[..., None].float()
        outputs = [layer.shared_output for layer in self.layers]
        return [(h * weights).sum(1) / weights.sum(1) for h in outputs if h is not None]

    def learn(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """One step of all discriminators; the size (rms) that each layer's outputs were divided by."""
        sizes, losses = [], []
        for at, (layer, discriminator, h) in enumerate(
            zip(self.layers, self.discriminators, pooled, strict=True)
        ):
            old = [self._sample(layer, one, at, max(len(h), 8)) for one in self.seen]
            per_task = [*old, h.detach().to(layer.shared_up)]
            size = torch.stack([each.square().mean() for each in per_task]).mean().sqrt()
            told = [
                cross_entropy(discriminator(each / size), torch.full((len(each),), task, device=h.device))
                for task, each in enumerate(per_task)
            ]
            losses.append(torch.stack(told).mean())
            sizes.append(size)
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        self.optimizer.step()
        return sizes

    def confusion(self, pooled: Sequence[Tensor], sizes: Sequence[Tensor]) -> Tensor:
        """Mean over layers and rows of CE(uniform, D(h))."""
        terms = []
        for discriminator, h, size in zip(self.discriminators, pooled, sizes, strict=True):
            frozen = discriminator.weight.detach(), discriminator.bias.detach()
            terms.append(-linear(h.to(size) / size, *frozen).log_softmax(-1).mean())
        return torch.stack(terms).mean()

    def drift(self) -> Tensor:
        """Mean over layers of tr(dB Sigma dB^T) as a share of what it was."""
        moved = []
        for layer, before, sigma, energy in zip(
            self.layers, self.before, self.sigma, self.energies, strict=True
        ):
            change = layer.shared_up - before
            moved.append((change @ sigma @ change.T).trace() / energy)
        return torch.stack(moved).mean()

    @torch.no_grad()
    def _sample(self, layer: TwoBranches, one: CodeStatistics, at: int, rows: int) -> Tensor:
        values, vectors = torch.linalg.eigh(one.covariance[at])
        root = (vectors * values.clamp(min=0).sqrt()).to(layer.shared_up)
        codes = one.mean[at].to(root) + torch.randn(rows, len(root)).to(root) @ root.T
        return layer.scale * codes @ layer.shared_up.T


def two_branches(model: Any, state: Any, gate_rate: float = 100.0, rate: float = 0.01) -> Game:
    """Puts two branches into ``model`` (plain, frozen from here on) as moe-cl's ``state`` after some tasks says.

    The new expert starts from the last one, its gates too.
    """
    shared, old = shared_in(state), experts_in(state)
    assert shared is not None
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    layers = []
    for name in shared.about.targets:
        logits = old[-1].gates[name]
        layer = TwoBranches(
            modules[name],
            shared.factors[name],
            old[-1].factors[name],
            logits,
            shared.scale,
            gate_rate,
        )
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
        layers.append(layer)
    statistics = [CodeStatistics.of(state["tensors"], at) for at in range(len(old))]
    shares = torch.stack(
        [torch.stack([expert.gates[name].softmax(-1)[0] for name in shared.about.targets]) for expert in old]
    )
    return Game(layers, [one for one in statistics if one is not None], shares, rate)


class ReferenceTrainer(SFTTrainer):
    """TRL's, with the game's terms in its loss."""

    game: Game
    weights: Mapping[str, float] = {"adversary": 0.1, "protect": 10.0}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        pooled = self.game.pooled(inputs["attention_mask"])
        with torch.autocast(self.args.device.type, enabled=False):
            sizes = self.game.learn(pooled)
            confusion, drift = self.game.confusion(pooled, sizes), self.game.drift()
        return loss + self.weights["adversary"] * confusion + self.weights["protect"] * drift
