"""Data sets and evaluations that come from another workspace: looked at before they are taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from meristem.data.datasets import ROWS_FILE, load_body
from meristem.data.formats import shape_of
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset, Evaluation, Record
from meristem.errors import BadInput
from meristem.evaluation.contamination import refuse_leaks
from meristem.evaluation.results import ItemResult
from meristem.evaluation.service import summary
from meristem.store.canonical import parse
from meristem.store.store import Store


def check_arrival(
    store: Store, suites: Iterable[AssetEntry], record: Record, read: Callable[[str], bytes]
) -> None:
    """Raises ``BadInput`` for rows that are test items of a suite here, and for what its own numbers contradict."""
    if isinstance(record, Asset) and record.kind == "dataset":
        rows = _rows(record, read)
        refuse_leaks(store, f"data {record.name} in the bundle", rows, suites)
    elif isinstance(record, Evaluation):
        _check_evaluation(record, read(record.results))


def _rows(record: Asset, read: Callable[[str], bytes]) -> list[dict[str, Any]]:
    try:
        body = read(record.files[ROWS_FILE])
        rows = load_body(body)
        tasks = {row["task"] for row in rows}
        sound = all(isinstance(row["id"], str) for row in rows) and set(record.facts["tasks"]) == tasks
        sound = sound and record.facts["rows"] == len(rows) and record.facts["shape"] == shape_of(rows)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"data {record.name} in the bundle: its rows are not what it says of them")
    return rows


def _check_evaluation(record: Evaluation, body: bytes) -> None:
    try:
        results: list[ItemResult] = parse(body)
        sound = bool(results) and summary(results) == record.summary
        sound = sound and all(isinstance(row["id"], str) for row in results)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"evaluation {record.digest} in the bundle: its results are not what it says of them")
