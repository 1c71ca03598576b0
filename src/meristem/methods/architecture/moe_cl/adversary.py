"""The task-aware discriminator of MoE-CL, and the game that keeps task noise out of the shared expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meristem.methods.architecture.moe_cl.codes import CodeStatistics


class Adversary:
    """One linear discriminator per layer, D_l (K, d_out) with a bias, that tells K tasks by the shared expert's output.

        h = B_0 z / rms(B_0 z)           z (r): mean over a row's tokens of A_0 x, no gradient
        D step:  minimise  mean over tasks k of CE(k, D_l(h)), K - 1 old tasks sampled, the new one live
        G step:  minimise  mean over layers and rows of the new task of CE(uniform, D_l(h)),  in B_0 alone

    Old tasks are N(mean, covariance) of their stored codes, pushed through the present B_0. The rms is over the D
    step's samples, and constant in both steps: shrinking B_0 gains nothing. The G step's bounded target is the
    confusion loss of Tzeng et al. 2015 (arXiv 1510.02192, eq. 3) in place of a maximised cross-entropy. D has an
    optimizer of its own (Adam) and ``steps`` steps at each micro-batch, before the shared expert's gradient.
    """

    def __init__(
        self,
        ups: Callable[[], Sequence[Tensor]],
        seen: Sequence[CodeStatistics],
        rate: float,
        steps: int,
        draw: Callable[[int], torch.Generator],
    ) -> None:
        """``ups()`` gives B_0 (d_out, r) of each layer as it is; ``draw(n)`` what the n-th D step samples with."""
        self.ups, self.steps, self.draw, self.done = ups, steps, draw, 0
        widths = [len(up) for up in ups()]
        self.groups = [[at for at, w in enumerate(widths) if w == width] for width in dict.fromkeys(widths)]
        first = ups()[0]
        exact = torch.promote_types(first.dtype, torch.float32)
        options = {"device": first.device, "dtype": exact}
        self.means = torch.stack([one.mean for one in seen]).to(**options)  # (K - 1, L, r)
        self.factors = torch.stack([_root(one.covariance) for one in seen]).to(**options)  # (K - 1, L, r, r)
        tasks = len(seen) + 1
        self.weights = [
            torch.zeros(len(g), tasks, widths[g[0]], requires_grad=True, **options) for g in self.groups
        ]
        self.biases = [torch.zeros(len(g), 1, tasks, requires_grad=True, **options) for g in self.groups]
        self.sizes = [torch.ones(len(g), 1, 1, **options) for g in self.groups]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=rate)

    def learn(self, codes: Tensor) -> None:
        """The D steps, on codes (L, rows, r) of the new task."""
        for _ in range(self.steps):
            samples = self._sampled(max(codes.shape[1], 8))  # (L, K - 1, n, r)
            with torch.enable_grad():
                loss = sum(
                    (self._d_loss(g, codes, samples) for g in range(len(self.groups))), torch.zeros(())
                )
            self.optimizer.zero_grad()
            loss.backward()
            self._reduce()
            self.optimizer.step()
            self.done += 1

    def _reduce(self) -> None:
        """The mean of the gradients over the processes of DDP, so that all of them have one and the same D."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in (*self.weights, *self.biases):
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= torch.distributed.get_world_size()

    def confusion(self, codes: Tensor) -> Tensor:
        """The G loss on codes (L, rows, r) of the new task, at least log K."""
        codes, terms = codes.to(self.means), []
        for g, layers in enumerate(self.groups):
            h = codes[layers] @ self._ups(g).mT / self.sizes[g]
            logits = h @ self.weights[g].detach().mT + self.biases[g].detach()
            terms.append(-logits.log_softmax(-1).mean((1, 2)).sum())
        return torch.stack(terms).sum() / codes.shape[0]

    def _d_loss(self, g: int, codes: Tensor, samples: Tensor) -> Tensor:
        """Sum over the group's layers of the mean over tasks of the cross-entropy."""
        layers, ups = self.groups[g], self._ups(g).detach()
        per_task = [*samples[layers].unbind(1), codes[layers].to(samples)]
        outputs = [z @ ups.mT for z in per_task]
        energy = torch.stack([h.square().mean((1, 2), keepdim=True) for h in outputs]).mean(0)
        self.sizes[g] = energy.sqrt().clamp(min=torch.finfo(energy.dtype).tiny)
        total = torch.zeros((), device=ups.device)
        for task, h in enumerate(outputs):
            logits = h / self.sizes[g] @ self.weights[g].mT + self.biases[g]
            told = torch.full(logits.shape[:2], task, device=ups.device)
            total = total + cross_entropy(logits.flatten(0, 1), told.flatten())
        return total * len(layers) / len(outputs)

    def _ups(self, g: int) -> Tensor:
        found = self.ups()
        return torch.stack([found[at] for at in self.groups[g]]).to(self.means.dtype)

    def _sampled(self, rows: int) -> Tensor:
        """(L, K - 1, rows, r), drawn on the CPU: the same on any device."""
        tasks, layers, rank = self.means.shape
        noise = torch.randn(tasks, layers, rows, rank, generator=self.draw(self.done)).to(self.means)
        return (self.means[:, :, None] + noise @ self.factors.mT).transpose(0, 1)

    def state(self) -> dict[str, Tensor]:
        found = {"discriminator.done": torch.tensor(self.done)}
        for at, parameter in enumerate([*self.weights, *self.biases]):
            found[f"discriminator.{at}"] = parameter.detach().clone()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                found[f"discriminator.{at}.{name}"] = value.detach().clone()
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.done = int(tensors["discriminator.done"])
        for at, parameter in enumerate([*self.weights, *self.biases]):
            with torch.no_grad():
                parameter.copy_(tensors[f"discriminator.{at}"])
            head = f"discriminator.{at}."
            kept = {n.removeprefix(head): v.clone() for n, v in tensors.items() if n.startswith(head)}
            if kept:
                self.optimizer.state[parameter] = {
                    n: v.to(parameter.device) if n != "step" else v for n, v in kept.items()
                }


def _root(covariance: Tensor) -> Tensor:
    """F (L, r, r) with F F^T = covariance, also where it is singular."""
    values, vectors = torch.linalg.eigh(covariance.cpu().double())
    return (vectors * values.clamp(min=0).sqrt()[:, None, :]).float()
