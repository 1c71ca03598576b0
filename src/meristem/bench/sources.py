"""Rows of a task's split, from a local folder or from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meristem._quiet import quiet_libraries
from meristem.bench.protocols import Hub, Protocol, Shape, Task
from meristem.data.jsonl import SUFFIXES, read_objects
from meristem.ecosystem.hub import HUB
from meristem.errors import BadInput, EnvironmentFailure

Row = dict[str, str]
KEYS: dict[Shape, tuple[str, ...]] = {
    "choice": ("text", "label"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}


def sources_of(protocol: Protocol, data: Path | None, given: Mapping[str, str]) -> dict[str, Path | Hub]:
    """Where each task of ``protocol`` lies: as ``given`` (a folder or ``hf:ORG/NAME``), else in ``data``, else its hub id.

    Raises ``BadInput`` for a folder that is missing and for a task without a source.
    """
    if data is not None and not data.is_dir():
        raise BadInput(f"--data {data}: no such folder")
    known = [task.name for task in protocol.tasks]
    for name in given:
        if name not in known:
            raise BadInput(f"--task {name}: {protocol.name} has no such task; it has {', '.join(known)}")
    return {task.name: _source(task, data, given.get(task.name)) for task in protocol.tasks}


def _source(task: Task, data: Path | None, given: str | None) -> Path | Hub:
    if given is not None and given.startswith(HUB):
        name, _, config = given.removeprefix(HUB).partition(":")
        return Hub(name, config or None)
    folder = Path(given) if given is not None else data / task.folder if data is not None else None
    if folder is None:
        if task.hub is None:
            raise BadInput(
                f"task {task.name}: no public copy is known; give --data FOLDER or --task {task.name}=..."
            )
        return task.hub
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; task {task.name} needs its train and test files there")
    return folder


def read_split(task: Task, source: Path | Hub, split: str, shape: Shape) -> list[Row]:
    """All rows of ``split`` (``train`` or ``test``), with the keys of ``shape`` and strings as values."""
    if isinstance(source, Hub):
        return _hub_rows(task, source, split, shape)
    path = next((p for s in SUFFIXES if (p := source / f"{split}{s}").is_file()), None)
    if path is None:
        raise BadInput(f"{source}: no {split}.jsonl or {split}.jsonl.gz; task {task.name} needs it")
    rows = []
    for number, row in read_objects(path):
        for key in KEYS[shape]:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise BadInput.at(
                    path, number, f'a row needs "{key}", a string; a {shape} task has {KEYS[shape]}'
                )
        rows.append({key: row[key] for key in KEYS[shape]})
    return rows


def _hub_rows(task: Task, hub: Hub, split: str, shape: Shape) -> list[Row]:
    try:
        with quiet_libraries():
            from datasets import ClassLabel, load_dataset

            found = load_dataset(hub.name, hub.config, split=hub.test if split == "test" else split)
    except ImportError as error:
        raise BadInput("datasets is not installed; pip install 'meristem[train]'") from error
    except Exception as error:
        line = " ".join(str(error).split())
        raise EnvironmentFailure(
            f"task {task.name}: {HUB}{hub.name} cannot be loaded ({line}); give its folder with --task "
            f"{task.name}=FOLDER"
        ) from error
    feature = found.features.get(hub.label)
    names = feature.names if isinstance(feature, ClassLabel) else None
    try:
        return [_as_row(row, hub, shape, names) for row in found]
    except KeyError as error:
        raise BadInput(f"task {task.name}: {HUB}{hub.name} has no column {error}") from error


def _as_row(row: Mapping[str, Any], hub: Hub, shape: Shape, names: list[str] | None) -> Row:
    if shape == "choice":
        label = row[hub.label]
        return {"text": hub.text.format_map(row), "label": names[label] if names else str(label)}
    return {key: str(row[key]) for key in KEYS[shape]}
