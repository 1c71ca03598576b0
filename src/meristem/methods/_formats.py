"""Formats of raw rows: what one training set may hold together."""

from __future__ import annotations

from collections.abc import Iterable

from meristem.errors import BadInput
from meristem.methods.base import Row

PAYLOAD = ("messages", "prompt", "completion", "text", "chosen", "rejected", "input_ids")


def check_format(method: str, row: Row, held: Iterable[Row]) -> None:
    """``BadInput`` unless ``held`` are of the format of ``row``: a trainer looks at the first row only."""
    wanted = {key for key in PAYLOAD if row.get(key) is not None}
    for old in held:
        found = {key for key in PAYLOAD if old.get(key) is not None}
        if found != wanted:
            raise BadInput(
                f"{method}: kept row {old['id']!r} of task {old['task']!r} has {sorted(found)}, "
                f"the new rows have {sorted(wanted)}: bring both to one format"
            )
