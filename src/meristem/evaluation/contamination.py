"""Test items that also stand in training data: refused before anything is trained or measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from meristem.data.overlap import leaks
from meristem.ecosystem.assets import AssetEntry
from meristem.errors import BadInput
from meristem.evaluation.service import load_suite_asset
from meristem.evaluation.suites import Suite
from meristem.store.store import Store


def refuse_leaks(
    store: Store, where: str, rows: Sequence[dict[str, Any]], suites: Iterable[AssetEntry]
) -> None:
    """Raises ``BadInput`` naming the first rows of ``where`` whose input is a test item of ``suites``."""
    for entry in suites:
        refuse_leaks_into(where, rows, entry.label, load_suite_asset(store, entry))


def refuse_leaks_into(where: str, rows: Sequence[dict[str, Any]], label: str, suite: Suite) -> None:
    found = leaks(rows, suite.test_rows())
    if found:
        shown = ", ".join(f"{row} = {item}" for row, item in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise BadInput(
            f"{where}: {len(found)} training rows are also test items of suite {label} ({shown}{more}); "
            "remove them from the training data"
        )
