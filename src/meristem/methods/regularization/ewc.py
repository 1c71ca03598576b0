"""Elastic weight consolidation, online form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meristem.errors import BadInput
from meristem.methods.base import Context, Method, MethodState, Params, Row, trainable


class EWC(Method):
    """Holds the weights that earlier tasks depend on: a quadratic penalty weighted by the diagonal Fisher.

    penalty = strength / 2 * sum_i F_i (theta_i - theta*_i)^2          (Kirkpatrick et al. 2017, eq. 3)

    over the trainable parameters theta (flattened, each F as large as its parameter). F is the diagonal
    *empirical* Fisher: the mean over ``samples`` rows x of the squared gradient of the sequence
    log-likelihood, F_i = mean_x (d/d theta_i sum_t log p(y_t | y_<t, x))^2, one backward per row. Squaring the
    gradient of a batch mean instead, a common mistake, shrinks F by up to the batch size and lets gradients
    of opposite sign cancel. Online over tasks: F <- gamma F + F_new, anchored at the latest weights theta*
    (Schwarz et al. 2018, arXiv 1805.06370).

    Without saved state and with history, ``prepare_model`` estimates F from the earlier rows: the model and
    the tokenizer exist by then, and the weights are still the start weights that become the anchor.

    ``strength``: on LoRA weights of a 135M model, held-out rows of the first of two tasks kept 0.37 / 0.47 / 0.63
    of 0.63 at 50 / 500 / 5000, and the second reached 0.78 / 0.80 / 0.67 (one seed; benchmarks/README.md).

    Of a preference pair y is the chosen answer, whatever the loss that the pair is trained with.

    Source: arXiv 1612.00796. Claims: less forgetting. Stages: cpt, cit, ca. State: ``fisher.*`` and ``anchor.*``
    in fp32, twice the trainable parameters, whatever the number of tasks.
    """

    name = "ewc"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit", "ca"})
    old_data = "first"
    weight_state = True
    weight_copies = 2
    needs = frozenset({"likelihood"})

    def __init__(self, strength: float = 1000.0, samples: int = 64, gamma: float = 1.0) -> None:
        if not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
            raise BadInput(f"ewc: strength={strength!r} must be a finite number, 0 or more")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise BadInput(f"ewc: samples={samples!r} must be a whole number of rows, 1 or more")
        if not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
            raise BadInput(f"ewc: gamma={gamma!r} must be in [0, 1]")
        self.strength, self.samples, self.gamma = float(strength), samples, float(gamma)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.tasks: set[str] = set()  # whose Fisher is in the sum

    def prepare_model(self, model: nn.Module, ctx: Context) -> None:
        self._check_fits(trainable(model))
        for task, rows in ctx.history.items():
            if len(rows) and task not in self.tasks:
                self._consolidate(ctx, rows, f"Fisher of {task}")

    def penalty(self, params: Params) -> Tensor:
        total = next(iter(params.values())).new_zeros((), dtype=torch.float32)
        for name, parameter in params.items():
            if name in self.fisher:
                fisher, anchor = self._near(name, parameter)
                total = total + (fisher * (parameter.float() - anchor).square()).sum().to(total.device)
        return self.strength / 2 * total

    def finish(self, ctx: Context) -> None:
        if len(ctx.rows):
            self._consolidate(ctx, ctx.rows, f"Fisher of {ctx.task}")

    def state_dict(self) -> MethodState:
        tensors = {f"fisher.{name}": value.detach().cpu().clone() for name, value in self.fisher.items()}
        tensors |= {f"anchor.{name}": value.detach().cpu().clone() for name, value in self.anchor.items()}
        return {"tensors": tensors, "json": {"tasks": sorted(self.tasks)}}

    def load_state_dict(self, state: MethodState) -> None:
        tensors = state["tensors"]
        self.fisher = {
            k.removeprefix("fisher."): v.float() for k, v in tensors.items() if k.startswith("fisher.")
        }
        self.anchor = {
            k.removeprefix("anchor."): v.float() for k, v in tensors.items() if k.startswith("anchor.")
        }
        self.tasks = set(state["json"]["tasks"])
        if self.fisher.keys() != self.anchor.keys():
            raise BadInput("ewc: the saved state has Fisher values without their anchor weights")

    def _consolidate(self, ctx: Context, rows: Sequence[Row], label: str) -> None:
        """F <- gamma F + F_new, anchor at the weights as they are."""
        new = self._estimate(ctx, rows, label)
        self.fisher = {
            name: value + self.gamma * self.fisher[name].to(value.device) if name in self.fisher else value
            for name, value in new.items()
        }
        self.anchor = {name: p.detach().float().clone() for name, p in trainable(ctx.model).items()}
        self.tasks |= {row["task"] for row in rows}

    def _estimate(self, ctx: Context, rows: Sequence[Row], label: str) -> dict[str, Tensor]:
        """Mean over rows of squared per-row gradients of the sequence log-likelihood, by parameter name."""
        params = trainable(ctx.model)
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        advance = ctx.progress(label, min(self.samples, len(rows)))
        count, was_training = 0, ctx.model.training
        ctx.model.eval()
        try:
            for batch in ctx.batches(rows, batch_size=1, limit=self.samples):
                # ctx.loss is a mean over tokens; the log-likelihood of the sequence is the sum
                likelihood = ctx.loss(batch) * _tokens(batch)
                grads = torch.autograd.grad(likelihood, list(params.values()), allow_unused=True)
                for name, grad in zip(params, grads, strict=True):
                    if grad is not None:
                        total[name] += grad.float().square()
                count += 1
                advance(1)
        finally:
            ctx.model.train(was_training)
        if not count:
            raise BadInput("ewc: no row has completion tokens to estimate the Fisher from; raise max_length")
        return {name: value / count for name, value in total.items()}

    def _near(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Fisher and anchor on the parameter's device, moved once."""
        if self.fisher[name].device != parameter.device:
            self.fisher[name] = self.fisher[name].to(parameter.device)
            self.anchor[name] = self.anchor[name].to(parameter.device)
        return self.fisher[name], self.anchor[name]

    def _check_fits(self, params: Params) -> None:
        for name, value in self.fisher.items():
            found = tuple(params[name].shape) if name in params else None
            if found != tuple(value.shape):
                raise BadInput(
                    f"ewc: the saved state is for another set of trainable parameters ({name} is "
                    f"{tuple(value.shape)} there, {found or 'absent'} here): keep the adapter's shape and name"
                )


def _tokens(batch: dict[str, Tensor]) -> int:
    """Completion tokens that the shifted loss counts."""
    return int((batch["labels"][:, 1:] != -100).sum())
