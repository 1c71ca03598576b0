"""Result files: one per run, with all that decided it and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meristem.bench.lineup import Run
from meristem.errors import BadInput
from meristem.store.canonical import PREFIX, digest_document
from meristem.store.packs import disk_failure, write_file_durably

SCHEMA = "meristem/bench-result/v1"
FOLDER = "results"

Result = dict[str, Any]


def path_of(out: Path, run: Run) -> Path:
    return out / FOLDER / f"{run.name}.json"


def find(out: Path, run: Run) -> Result | None:
    """The result of this very run, None when there is none yet.

    Raises ``BadInput`` when its file was made with other settings: their numbers must not be mixed.
    """
    path = path_of(out, run)
    if not path.exists():
        return None
    found = read(path)
    if other := differences(found["settings"], run.settings):
        shown = "; ".join(f"{where} {_short(old)}, now {_short(new)}" for where, old, new in other[:3])
        more = f"; and {len(other) - 3} more" if len(other) > 3 else ""
        raise BadInput(
            f"{path}: made with other settings ({shown}{more}); give another --out, or these settings"
        )
    return found


def read(path: Path) -> Result:
    """A result file, checked against its own digest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable result file; delete it, and its run is done again") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BadInput(f"{path}: not a {SCHEMA} file; move it elsewhere")
    if digest_document(found["settings"]) != found["digest"]:
        raise BadInput(
            f"{path}: its settings do not match their digest; delete it, and its run is done again"
        )
    return found


def read_all(out: Path) -> list[Result]:
    """Every result under ``out``, by file name. Raises ``BadInput`` when there is none."""
    found = [read(path) for path in sorted((out / FOLDER).glob("*.json"))]
    if not found:
        raise BadInput(f"{out}: no results here; `meristem bench run` makes them")
    return found


def write(out: Path, run: Run, outcome: Mapping[str, Any]) -> Path:
    path = path_of(out, run)
    document = {"schema": SCHEMA, "name": run.name, "digest": run.digest, **outcome, "settings": run.settings}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_durably(path, (json.dumps(document, indent=2) + "\n").encode())
    except OSError as error:
        raise disk_failure(error, path) from error
    return path


def _short(value: Any) -> str:
    return str(value)[:15] + "..." if str(value).startswith(PREFIX) else str(value)


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """``(key, old, new)`` of every leaf that differs, sizes before digests. A model's content None is not known yet."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        found = [
            leaf
            for key in keys
            for leaf in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
        return sorted(found, key=lambda leaf: str(leaf[1]).startswith(PREFIX))
    unknown = where == "model.content" and new is None
    return [] if old == new or unknown else [(where, old, new)]
