"""Which experts answer a row, read from its prompt alone: what it is measured by, and the weights of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize, one_hot

from meristem.experts_format import RouterEntry


@dataclass(frozen=True)
class Routing:
    """Weights (batch, experts) of one batch; a row of zeros is of no known task. ``active``: frozen experts in use.

    With an expert in training its column is the last. ``newest_alone``: that column is 1 for every row.
    """

    weights: Tensor
    active: tuple[int, ...]
    newest_alone: bool = False

    @property
    def unknown(self) -> Tensor:
        """(batch): the weight that no expert has."""
        return 1 - self.weights.sum(-1)

    @cached_property
    def choice(self) -> list[int] | None:
        """The column of each row's one expert (of a row of zeros, any); None where some row blends several."""
        if bool(((self.weights != 0).sum(1) > 1).any()):
            return None
        found: list[int] = self.weights.argmax(1).tolist()
        return found


def weigh(router: RouterEntry, features: Tensor, vectors: Tensor) -> Tensor:
    """(batch, experts) from features (batch, width) and vectors (experts, width)."""
    alike = normalize(features, dim=-1) @ normalize(vectors, dim=-1).T
    if router.mode == "softmax":
        return (alike / router.temperature).softmax(-1)
    best, which = alike.max(-1)
    weights = one_hot(which, len(vectors)).to(alike)
    return weights if router.unknown is None else weights * (best >= router.unknown)[:, None]


def features(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """(rows, width): the mean input embedding of each row's token ids, each row by itself."""
    table = model.get_input_embeddings().weight
    kind = torch.promote_types(table.dtype, torch.float32)
    with torch.no_grad():
        return torch.stack([embedding(ids.to(table.device), table).to(kind).mean(0) for ids in rows])


def prompt_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """(batch, length), True on prompt tokens: labelled -100 and no padding; on all of a row where it has none."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or labels.shape != ids.shape:
        return None
    real = real_tokens(ids, batch.get("attention_mask"))
    return or_all(real & (labels == -100), real)


def real_tokens(ids: Tensor, mask: Any) -> Tensor:
    """(batch, length), True where there is no padding, as far as the mask says."""
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool)


def or_all(mask: Tensor, real: Tensor) -> Tensor:
    """``mask``, but of a row where it is empty all real tokens, or all there are."""
    real = real | ~real.any(1, keepdim=True)
    return mask | (real & ~mask.any(1, keepdim=True))
