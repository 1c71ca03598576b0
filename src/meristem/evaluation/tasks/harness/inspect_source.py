"""Tasks of installed Inspect packages: found by their registered name, read, and pinned. Imports inspect_ai.

An Inspect task is a Python function. It runs only when an installed package registers it (entry-point group
``inspect_ai``): whoever installed the package chose that code. A Python file beside a suite is never run.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from inspect_ai._util.registry import (
    registry_create,
    registry_info,
    registry_lookup,
    registry_unqualified_name,
)
from inspect_ai.dataset import Sample
from inspect_ai.scorer._reducer.registry import reducer_log_name
from inspect_ai.scorer._scorer import unique_scorer_name

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message
from meristem.evaluation.tasks.harness.shared import digest, first_line

ROLES = frozenset({"system", "user", "assistant"})


def build(name: str, args: Mapping[str, Any]) -> Any:
    """The task as its package makes it. ``BadInput`` when none registers it, or when it cannot run here."""
    _entry(name.partition("/")[0])
    if registry_lookup("task", name) is None:
        raise BadInput(f"its package registers no Inspect task {name!r}, or cannot be imported")
    try:
        built = registry_create("task", name, **args)
    except Exception as error:  # the package's own code: it may raise anything
        raise BadInput(f"Inspect cannot build {name!r} ({first_line(error)})") from error
    _check(built)
    return built


def choose(built: Any, metric: str) -> str:
    """The scorer, or ``scorer/key``, that an item's score is taken from."""
    names = scorers(built)
    if metric and metric.partition("/")[0] not in names:
        raise Refused(f"metric: it has no scorer {metric!r}; its scorers are {', '.join(names)}")
    return metric or names[0]


def scorers(built: Any) -> list[str]:
    """Names as they stand in Inspect's log."""
    names: list[str] = []
    for scorer in built.scorer or ():
        names.append(unique_scorer_name(scorer, names))
    return names


def samples(built: Any, limit: int | None) -> dict[str, Sample]:
    """By id; Inspect numbers samples without one from 1. ``Refused`` for what a text model alone cannot solve."""
    found: dict[str, Sample] = {}
    for at, sample in enumerate(list(built.dataset)[:limit]):
        id = str(at + 1 if sample.id is None else sample.id)
        if id in found:
            raise Refused(f"two samples have the id {id!r}")
        if sample.sandbox or sample.files or sample.setup:
            raise Refused(f"sample {id!r} needs a sandbox; tasks that run tools or code are not supported")
        messages(sample)
        found[id] = sample
    if not found:
        raise Refused("it has no samples")
    return found


def digests(found: Mapping[str, Sample]) -> dict[str, str]:
    """Of each sample: input, choices, target and metadata; not the ids that Inspect gives to messages."""
    return {
        id: digest(
            {
                "input": [message.to_document() for message in messages(sample)],
                "metadata": sample.model_dump(mode="json", include={"metadata", "choices", "target"}),
            }
        )
        for id, sample in found.items()
    }


def messages(sample: Sample) -> tuple[Message, ...]:
    """``Refused`` for images, audio and calls of tools."""
    if isinstance(sample.input, str):
        return (Message("user", sample.input),)
    for message in sample.input:
        parts = [] if isinstance(message.content, str) else message.content
        if message.role not in ROLES or any(part.type != "text" for part in parts):
            raise Refused(
                f"a message of role {message.role!r}, or its content, is no text; only text is supported"
            )
    return tuple(Message(message.role, message.text) for message in sample.input)


def item(id: str, sample: Sample) -> Item:
    """What people and leak checks read."""
    targets = [sample.target] if isinstance(sample.target, str) else list(sample.target)
    return Item(
        id,
        messages(sample),
        (targets or [""])[0],
        tuple(sample.choices or ()),
        references=tuple(targets[1:]),
    )


def code_digest(built: Any, name: str) -> str:
    """Of the task: its package's version, every Python file beside the task's own, solvers, scorers, settings."""
    function = inspect.unwrap(registry_lookup("task", name))
    folder = Path(inspect.getfile(function)).parent
    files = {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.py"))
    }
    package = _entry(name.partition("/")[0]).dist
    return digest(
        {
            "package": [package.name, package.version] if package else None,
            "files": files,
            "version": str(built.version),
            "solver": registry_info(built.solver).name,
            "scorers": scorers(built),
            "config": built.config.model_dump(mode="json", exclude_none=True),
        }
    )


@cache
def _entry(package: str) -> EntryPoint:
    found = list(entry_points(group="inspect_ai", name=package))
    if not found:
        raise BadInput(
            f"no installed package registers Inspect tasks as {package!r} (entry-point group inspect_ai); "
            "install the task's package: a Python file is not run"
        )
    return found[0]


def _check(built: Any) -> None:
    reducers = {reducer_log_name(reducer) for reducer in built.epochs_reducer or ()}
    graded = [
        name for s in built.scorer or () if (name := registry_unqualified_name(s)).startswith("model_graded")
    ]
    reasons = {
        "it makes its samples while it runs": built.sample_source is not None,
        "it needs a sandbox; tasks that run tools or code are not supported": built.sandbox is not None,
        "it names its own models": built.model is not None or bool(built.model_roles),
        "it has no scorer": not built.scorer,
        f"its scorer {graded[0] if graded else ''} asks a model; use a generate task with a judge": bool(
            graded
        ),
        f"it reduces epochs by {', '.join(sorted(reducers))}; only the mean is supported": bool(
            reducers - {"mean"}
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise BadInput(reason)
