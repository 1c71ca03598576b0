"""Which task a prompt is of, or none that was learned: Mahalanobis distance to one prototype per task.

With h_j the hidden state of prompt token j after the base's first ``depth`` blocks (adapters off), a prompt is one
feature f = mean_j h_j / rms(h_j) (width): no token takes more than its share, where the plain mean is mostly the first
token, which many language models make far longer than all others. Task t keeps the mean mu_t of its n_t training
prompts, and of m_t <= n_t of them the residuals r = f - mu_t. All tasks share one covariance, the within-task one,
shrunk to its diagonal:

    S = sum r r^T / N,  N = sum_t m_t (n_t - 1) / n_t        D = diag S        C = (1 - shrinkage) S + shrinkage D
    d_t(f)^2 = (f - mu_t)^T C^-1 (f - mu_t)
    top-1:   one-hot of argmin_t d_t
    softmax: softmax_t(-d_t^2 / (2 temperature)), at temperature 1 the posterior of equally likely Gaussian tasks
    unknown: no weight at all where d_t(f) > radius_t of the nearest t, the ``quantile`` of the distances of t's own
             training prompts, each as if it had been left out of mu_t and of C:
             d_i^2 = g^2 a_i / (1 - c a_i),  a_i = r_i^T C^-1 r_i,  g = n / (n - 1),  c = (1 - shrinkage) g / N
             (Sherman & Morrison 1950; exact for given N and D where all n residuals are kept)

A task's own tensors never change again: a task more changes C and the radii, which :func:`pool` makes anew from what
is kept, and needs no prompt of an old task. Routing a batch costs (batch x width x (width + tasks)) products.

Sources: the distance under a covariance that classes share, and its use against unseen input, Lee et al. 2018 (arXiv
1807.03888, eq. 1 and 2); class means as prototypes, Snell et al. 2017 (arXiv 1703.05175); the
shrunk covariance, Friedman 1989 (Regularized Discriminant Analysis), here to the diagonal, so that the unit of a
dimension does not matter. docs/moe-cl.md has what depth, shrinkage and quantile were chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from meristem.errors import BadInput, Clash
from meristem.methods.architecture.routing import features

KEPT = 64  # residuals per task
SHRINKAGE = 0.5
QUANTILE = 0.95
_ROUNDING = 1e-4  # a spread below this share of a dimension's size is no spread
_TINY = 1e-12  # a mean square below this is a hidden state of zeros


@dataclass(frozen=True)
class Prototype:
    """A task: ``mean`` (width) over ``n`` prompts, and ``residuals`` (m, width) of m <= n of them, float32."""

    mean: Tensor
    residuals: Tensor
    n: int

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`of_tensors` takes back, for safetensors."""
        return {"mean": self.mean, "residuals": self.residuals, "n": torch.tensor(self.n)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Prototype:
        if absent := sorted({"mean", "residuals", "n"} - set(tensors)):
            raise BadInput(f"a prototype without {absent[0]}: it was not saved whole; save the version again")
        return cls(tensors["mean"], tensors["residuals"], int(tensors["n"]))


def summarise(features: Tensor, kept: int = KEPT) -> Prototype:
    """The prototype of a task from features (n, width) of its training prompts; ``kept`` of them, evenly spread, stay.

    Raises ``BadInput`` for no row and for values that are not finite.
    """
    if features.dim() != 2 or not len(features):
        raise BadInput(f"a prototype is of (prompts, width) features, and these are {tuple(features.shape)}")
    if not features.isfinite().all():
        raise BadInput("a prompt's features are not finite; load the base in float32 or bfloat16")
    exact = features.detach().cpu().double()
    mean = exact.mean(0)
    at = torch.linspace(0, len(exact) - 1, min(kept, len(exact))).round().long()
    return Prototype(mean.float(), (exact[at] - mean).float(), len(exact))


@dataclass(frozen=True)
class Pooled:
    """What a batch is routed with: whitened x = (f - centre) @ whiten, tasks (tasks, width) in x, radii (tasks)."""

    centre: Tensor
    whiten: Tensor
    tasks: Tensor
    radii: Tensor

    def like(self, features: Tensor) -> Pooled:
        """On the device and in the dtype of ``features``: what a caller keeps, so that no batch moves it again."""
        parts = {name: getattr(self, name).to(features) for name in ("centre", "whiten", "tasks", "radii")}
        return replace(self, **parts)

    def distances(self, features: Tensor) -> Tensor:
        """d_t (batch, tasks) of features (batch, width)."""
        x = (features - self.centre.to(features)) @ self.whiten.to(features)
        # By differences: the products of large coordinates that cancel would cost float32 its digits.
        return torch.cdist(x, self.tasks.to(x), compute_mode="donot_use_mm_for_euclid_dist")

    def weigh(
        self,
        features: Tensor,
        mode: Literal["top-1", "softmax"] = "top-1",
        temperature: float = 1.0,
        unknown: bool = True,
    ) -> Tensor:
        """Weights (batch, tasks) that add up to 1 in each row; with ``unknown`` a row outside its radius is zero.

        Of equally near tasks the earliest is taken.
        """
        distances = self.distances(features.to(torch.promote_types(features.dtype, torch.float32)))
        nearest = distances.argmin(1)
        if mode == "top-1":
            weights = one_hot(nearest, len(self.tasks)).to(distances)
        else:
            weights = (-distances.square() / (2 * temperature)).softmax(1)
        if not unknown:
            return weights
        inside = distances.gather(1, nearest[:, None])[:, 0] <= self.radii.to(distances)[nearest]
        return weights * inside[:, None]


def pool(prototypes: Sequence[Prototype], shrinkage: float = SHRINKAGE, quantile: float = QUANTILE) -> Pooled:
    """All tasks' prototypes in one metric, computed in float64 on the CPU.

    A task of one prompt has no radius of its own and takes the largest of the others; where no task has more than one
    prompt nothing is unknown, for nothing is known of distances.
    """
    _refuse_odd(prototypes, shrinkage, quantile)
    means = torch.stack([each.mean for each in prototypes]).cpu().double()
    residuals = [each.residuals.cpu().double() for each in prototypes]
    freedom = sum(len(each.residuals) * (each.n - 1) / each.n for each in prototypes) or 1.0
    every = torch.cat(residuals)
    variance = every.square().sum(0) / freedom
    least = (_ROUNDING * means.abs().amax(0)).square()
    scale = torch.where(variance + least > 0, torch.maximum(variance, least), 1.0).rsqrt()
    shared = (every * scale).T @ (every * scale) / freedom
    unit = torch.eye(len(scale), dtype=scale.dtype)
    lower = torch.linalg.cholesky((1 - shrinkage) * shared + shrinkage * unit)
    whiten = scale[:, None] * torch.linalg.solve_triangular(lower, unit, upper=False).T
    radii = torch.stack(
        [
            _radius(own @ whiten, each.n, (1 - shrinkage) / freedom, quantile)
            for own, each in zip(residuals, prototypes, strict=True)
        ]
    )
    radii = radii.clamp_min(1.0)  # within one standard deviation a prompt is no stranger
    measured = radii.isfinite()
    radii = torch.where(measured, radii, radii[measured].max() if measured.any() else torch.inf)
    centre = means.mean(0)
    return Pooled(centre, whiten, (means - centre) @ whiten, radii)


def weigh(
    prototypes: Sequence[Prototype],
    features: Tensor,
    mode: Literal["top-1", "softmax"] = "top-1",
    temperature: float = 1.0,
    unknown: bool = True,
) -> Tensor:
    """:meth:`Pooled.weigh` of prototypes that are pooled for this call alone; keep :func:`pool`'s answer for more."""
    return pool(prototypes).weigh(features, mode, temperature, unknown)


def hidden_features(model: Any, rows: Sequence[Tensor], depth: int, batch_size: int = 16) -> Tensor:
    """(rows, width), float32 or the model's own if finer: each row's f after ``depth`` blocks, from its token ids.

    ``depth`` 0: the plain mean of the input embeddings. Only the embedding and those blocks are run, in batches of
    rows of like length, without dropout and gradients. Adapters and what hangs on the model by hooks act as in any
    forward: switch them off for the base's own features. Raises ``BadInput`` for an empty row and for a depth that the
    model lacks, ``Clash`` for a model whose blocks cannot be found.
    """
    if any(not len(row) for row in rows):
        raise BadInput("a prompt without tokens cannot be routed")
    if depth == 0:
        return features(model, rows)
    backbone = getattr(model, "base_model", model)
    blocks = decoder_blocks(model)
    if not 0 < depth <= len(blocks):
        raise BadInput(
            f"depth={depth}: the model has {len(blocks)} blocks; 0 to {len(blocks)} can be routed by"
        )
    device = model.get_input_embeddings().weight.device
    found: dict[int, Tensor] = {}
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad_sequence([rows[at] for at in chosen], batch_first=True).to(device)
        lengths = torch.tensor([len(rows[at]) for at in chosen], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = _after(backbone, blocks[depth - 1], ids, mask.long())
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        hidden = hidden * hidden.square().mean(-1, keepdim=True).clamp_min(_TINY).rsqrt()
        means = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        found |= dict(zip(chosen, means, strict=True))
    return torch.stack([found[at] for at in range(len(rows))])


def blocks_of(model: Any) -> int:
    """How deep prompts can be routed."""
    return int(model.config.get_text_config().num_hidden_layers)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The blocks of a causal model: the outermost list of as many modules as its config counts layers."""
    count = blocks_of(model)
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise Clash(
        f"{type(model).__name__} has no list of {count} blocks: its prompts can be routed by depth 0 alone"
    )


class _Reached(Exception):
    """Carries the hidden state out of a forward that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _after(backbone: Any, block: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    def stop(module: Any, inputs: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    training = [part for part in backbone.modules() if part.training]
    hook = block.register_forward_hook(stop)
    try:
        backbone.eval()
        with torch.no_grad():
            backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
        for part in training:
            part.training = True
    raise Clash(f"{type(backbone).__name__} did not run its blocks one after the other: route by depth 0")


def _radius(own: Tensor, n: int, share: float, quantile: float) -> Tensor:
    """Of whitened residuals ``own`` (m, width): the quantile of their left-out distances, nan for one prompt."""
    if n < 2:
        return torch.tensor(torch.nan, dtype=own.dtype)
    grown = n / (n - 1)
    within = own.square().sum(1)
    left_out = grown * (within / (1 - share * grown * within).clamp_min(_ROUNDING)).sqrt()
    return left_out.quantile(quantile)


def _refuse_odd(prototypes: Sequence[Prototype], shrinkage: float, quantile: float) -> None:
    if not prototypes:
        raise BadInput("nothing to route to: no prototype was given")
    if not 0 < shrinkage <= 1:
        raise BadInput(f"shrinkage={shrinkage!r} must be above 0 and at most 1")
    if not 0 < quantile <= 1:
        raise BadInput(f"quantile={quantile!r} must be above 0 and at most 1")
    width = len(prototypes[0].mean)
    for at, each in enumerate(prototypes):
        if each.mean.shape != (width,) or each.residuals.shape[1:] != (width,) or not len(each.residuals):
            raise BadInput(
                f"prototype {at} has mean {tuple(each.mean.shape)} and residuals {tuple(each.residuals.shape)}, "
                f"the first one's width is {width}; use prototypes of one base"
            )
