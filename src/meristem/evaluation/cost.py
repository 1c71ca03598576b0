"""What an evaluation of a version took: time per item and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult


@dataclass(frozen=True)
class Cost:
    """``seconds`` is wall time of the whole run, so ``seconds_per_item`` is that of a batched run and no latency
    of a single request. ``tokens`` is ``None`` unless every row carries ``detail["tokens"]``; rates are ``None``
    for a run that took no time."""

    items: int
    seconds: float
    items_per_second: float | None
    seconds_per_item: float
    tokens: int | None
    tokens_per_item: float | None
    tokens_per_second: float | None

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


def cost(results: Sequence[ItemResult], seconds: float) -> Cost:
    """Cost and latency of a run over ``results`` that took ``seconds``. ``BadInput`` without items or time."""
    if not results:
        raise BadInput("no results; the cost of an evaluation is told per item")
    if not math.isfinite(seconds) or seconds < 0:
        raise BadInput(f"an evaluation takes 0 or more seconds, not {seconds}")
    items = len(results)
    counted = [row["detail"].get("tokens") for row in results]
    known = [count for count in counted if count is not None]
    tokens = sum(known) if len(known) == items else None
    return Cost(
        items=items,
        seconds=seconds,
        items_per_second=items / seconds if seconds else None,
        seconds_per_item=seconds / items,
        tokens=tokens,
        tokens_per_item=None if tokens is None else tokens / items,
        tokens_per_second=tokens / seconds if tokens is not None and seconds else None,
    )
