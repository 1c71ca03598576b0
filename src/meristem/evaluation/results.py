"""The result of one test item, as it is stored and compared."""

from __future__ import annotations

from typing import Any, TypedDict


class ItemResult(TypedDict):
    """JSON-serialisable. ``score`` is 1.0 (right) or 0.0 (wrong); ``slice`` is ``None`` when not given.

    ``detail`` depends on the task type: ``{"logprobs": {option: log-likelihood}}`` for ``choice``, ``{}``
    for ``generate``.
    """

    task: str
    id: str
    slice: str | None
    score: float
    prediction: str
    answer: str
    detail: dict[str, Any]
