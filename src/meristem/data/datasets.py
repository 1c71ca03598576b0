"""Data sets as assets: a validated JSONL file in, normalised rows out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meristem.data.formats import Row, read_rows, shape_of
from meristem.store.packs import Blob
from meristem.store.store import Store

ROWS_FILE = "rows.jsonl"


def read_dataset(name: str, path: Path) -> tuple[Blob, dict[str, Any]]:
    """The rows of a file as one blob, and the facts about them. A row without ``task`` belongs to task ``name``.

    Raises ``BadInput`` with file, line and remedy (see ``formats.read_rows``).
    """
    rows = [{"task": name, **row} for row in read_rows(path)]
    body = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode()
    facts = {
        "rows": len(rows),
        "shape": shape_of(rows),
        "tasks": dict(sorted(Counter(row["task"] for row in rows).items())),
        "bytes": len(body),
    }
    return Blob.file(body), facts


def load_rows(store: Store, files: dict[str, str]) -> list[Row]:
    """The rows of a data set asset, bytes checked."""
    return load_body(store.read_blob(files[ROWS_FILE]))


def load_body(body: bytes) -> list[Row]:
    return [json.loads(line) for line in body.splitlines()]


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    return tasks
