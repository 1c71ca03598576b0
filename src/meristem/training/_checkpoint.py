"""Method state inside a Hugging Face checkpoint folder, and the mark that says the folder is whole.

::

    checkpoint-120/
      ...                        what Hugging Face wrote
      meristem/ewc.safetensors   tensors of a method
      meristem/ewc.json          its JSON
      meristem/COMPLETE          last: size and SHA-256 of every other file, and a digest over that list

Hugging Face writes its files one after the other without fsync; a folder without a matching COMPLETE is never
resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from meristem.errors import BadInput
from meristem.methods.base import MethodState

FOLDER, MARK, SCHEMA = "meristem", "COMPLETE", "meristem/checkpoint/v1"


def write(checkpoint: Path, states: Mapping[str, MethodState], step: int, finished: bool = False) -> None:
    """Adds the states to ``checkpoint`` and marks it complete; durable when it returns.

    ``finished``: they are those of a whole update, which the next one goes on from.
    """
    folder = checkpoint / FOLDER
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed here
    folder.mkdir(parents=True)
    for name, state in states.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state["tensors"].items()}
        _durable(folder / f"{name}.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
        _durable_json(folder / f"{name}.json", state["json"])
    files = _listing(checkpoint, sync=True)
    mark = {
        "schema": SCHEMA,
        "step": step,
        "methods": sorted(states),
        "finished": finished,
        "files": files,
        "digest": _digest(files),
    }
    _durable_json(folder / MARK, mark)
    _sync_folder(checkpoint)


def read(checkpoint: Path) -> dict[str, MethodState]:
    """The method states of a complete checkpoint; ``BadInput`` for any other folder."""
    problem = why_incomplete(checkpoint)
    if problem:
        raise BadInput(f"{checkpoint}: {problem}; give a complete one")
    folder = checkpoint / FOLDER
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    return {
        name: {
            "tensors": load_file(folder / f"{name}.safetensors"),
            "json": json.loads((folder / f"{name}.json").read_text(encoding="utf-8")),
        }
        for name in mark["methods"]
    }


def read_finished(folder: Path) -> dict[str, MethodState]:
    """What ``write`` left of a whole update; ``BadInput`` for a checkpoint on the way, whose methods were not done."""
    states = read(folder)
    if not json.loads((folder / FOLDER / MARK).read_text(encoding="utf-8")).get("finished"):
        raise BadInput(
            f"{folder}: a checkpoint on the way, whose methods had not finished: give the folder that "
            "save_method_state wrote after train()"
        )
    return states


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The ``checkpoint-N`` folder with the largest N whose files all match its COMPLETE; None without one."""
    root = Path(output_dir)
    found = [
        (int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return next((path for _, path in sorted(found, reverse=True) if why_incomplete(path) is None), None)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is there."""
    path = checkpoint / FOLDER / MARK
    try:
        mark: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {FOLDER}/{MARK} in it, so it was cut off while being written"
    except (OSError, ValueError):
        return f"{FOLDER}/{MARK} cannot be read"
    files = mark.get("files") if isinstance(mark, dict) else None
    if not isinstance(files, dict) or mark.get("schema") != SCHEMA or mark.get("digest") != _digest(files):
        return f"{FOLDER}/{MARK} is damaged or of an unknown kind"
    present = {str(p.relative_to(checkpoint).as_posix()) for p in _files(checkpoint)}
    for name, entry in files.items():
        if name not in present:
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != entry["bytes"] or _sha256(checkpoint / name) != entry[
            "sha256"
        ]:
            return f"{name} has changed since it was written"
    return None


def _files(checkpoint: Path) -> list[Path]:
    mark = checkpoint / FOLDER / MARK
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != mark)


def _listing(checkpoint: Path, sync: bool) -> dict[str, dict[str, Any]]:
    listing: dict[str, dict[str, Any]] = {}
    for path in _files(checkpoint):
        if sync:
            _sync_file(path)
        name = path.relative_to(checkpoint).as_posix()
        listing[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return listing


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _durable(path: Path, write_to: Any) -> None:
    """Temp name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    write_to(temporary)
    _sync_file(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def _durable_json(path: Path, value: Any) -> None:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    _durable(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
