"""Pair the results of two versions item by item; results that cannot be paired are refused."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult

Key = tuple[str, str]
UNITS = ("bits_per_byte", "nats")


class Pair(NamedTuple):
    """One item: ``name`` is task/id, ``scores`` (old, new); equal ``cluster`` = same source."""

    name: str
    task: str
    slice: str | None
    cluster: Hashable
    scores: tuple[float, float]


def paired(old: Sequence[ItemResult], new: Sequence[ItemResult]) -> tuple[list[Pair], str | None]:
    """Pairs in the order of ``old``, and the unit of the scores (``None``: shares in [0, 1]).

    ``BadInput`` unless both hold the same items, answers, clusters and unit. A cluster's name means the same
    source in every task of the suite; an item without one is its own source.
    """
    before, after = _by_key(old, "old"), _by_key(new, "new")
    _check_same(before, after)
    one, other = _unit(before, "old"), _unit(after, "new")
    if one != other:
        raise BadInput(
            f"the old scores are in {one or 'shares'}, the new in {other or 'shares'}; evaluate both on one suite"
        )
    return [_pair(key, row, after[key]) for key, row in before.items()], one


def _pair(key: Key, old: ItemResult, new: ItemResult) -> Pair:
    source = old.get("cluster")
    cluster: Hashable = ("item", *key) if source is None else ("source", source)
    return Pair("/".join(key), key[0], old["slice"], cluster, (old["score"], new["score"]))


def _by_key(results: Sequence[ItemResult], name: str) -> dict[Key, ItemResult]:
    found = {(result["task"], result["id"]): result for result in results}
    if not found:
        raise BadInput(f"the {name} results are empty; there is nothing to compare")
    if len(found) != len(results):
        raise BadInput(f"the {name} results hold an item twice; evaluate the suite again")
    bad = next((key for key, result in found.items() if not math.isfinite(result["score"])), None)
    if bad is not None:
        raise BadInput(f"the {name} score of item {'/'.join(bad)} is not a finite number")
    return found


def _check_same(before: dict[Key, ItemResult], after: dict[Key, ItemResult]) -> None:
    different = before.keys() ^ after.keys()
    if different:
        shown = ", ".join("/".join(key) for key in sorted(different)[:5])
        raise BadInput(
            f"not the same items: {len(different)} stand in one result only ({shown}); "
            "evaluate both versions on the same suite"
        )
    for what, plural in (("answer", "answers"), ("cluster", "clusters")):
        changed = next((key for key in before if before[key].get(what) != after[key].get(what)), None)
        if changed:
            raise BadInput(
                f"item {'/'.join(changed)} has two different {plural}; evaluate both on the same suite"
            )


def _unit(rows: dict[Key, ItemResult], name: str) -> str | None:
    units = {row.get("unit") for row in rows.values()}
    unit = units.pop()
    if units:
        raise BadInput(
            f"the {name} results mix scores of different units; put those tasks in suites of their own"
        )
    if unit is not None and unit not in UNITS:
        raise BadInput(f"the {name} results are in an unknown unit '{unit}'; known: {', '.join(UNITS)}")
    bad = next((key for key, row in rows.items() if unit is None and not 0 <= row["score"] <= 1), None)
    if bad is not None:
        raise BadInput(
            f"the {name} score of item {'/'.join(bad)} is {rows[bad]['score']:g}, not a share from 0 to 1; "
            f"scores of another kind carry a unit ({', '.join(UNITS)})"
        )
    return unit
