"""The result of one test item, as it is stored and compared."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class ItemResult(TypedDict):
    """JSON-serialisable. Higher ``score`` is better: right (1.0) or wrong (0.0), a share between them, or in ``unit``.

    ``slice`` is ``None`` when not given. ``unit`` is absent for shares, else ``bits_per_byte`` (the score is minus
    it) or ``nats``. ``cluster``, where present, names what items share that come from one source.

    ``detail`` depends on the task type. Common keys: ``logprobs`` ``{option: log-likelihood}``, ``tokens`` (how many
    were encoded or generated), ``truncated`` (how many of the prompt had no room; absent for none).
    """

    task: str
    id: str
    slice: str | None
    score: float
    prediction: str
    answer: str
    detail: dict[str, Any]
    cluster: NotRequired[str]
    unit: NotRequired[str]
