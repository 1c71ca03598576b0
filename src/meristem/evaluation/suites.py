"""Evaluation suites: a YAML file and its test items become one frozen, digestible value.

.. code-block:: yaml

    schema: meristem/suite/v1          # optional
    name: support-core
    tasks:
      - name: topics
        type: choice                   # choice: best option by log-likelihood; generate: greedy text
        data: topics.jsonl             # relative to this file
        metric: accuracy               # choice: accuracy; generate: exact_match
        kind: target                   # target | general | instruction | safety
        prompt: "Topic of: {text}"     # optional; else items have "prompt" or "messages"
        system: "Answer in one word."  # optional
        options: [billing, delivery]   # optional; else every item has its own

A line of ``data``: ``{"id", "prompt" | "messages" | template fields, "answer", "options", "slice"}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Rules, check_options, make_item, read_items, template_fields
from meristem.store.canonical import digest_document

SCHEMA = "meristem/suite/v1"
METRICS = {"choice": "accuracy", "generate": "exact_match"}
MAX_FILE = 1 << 20

TaskType = Literal["choice", "generate"]
Metric = Literal["accuracy", "exact_match"]
Kind = Literal["target", "general", "instruction", "safety"]


class TaskFile(BaseModel):
    """One task as written in the YAML file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    type: TaskType
    data: str = Field(min_length=1)
    metric: Metric
    kind: Kind
    prompt: str | None = None
    system: str | None = Field(default=None, min_length=1)
    options: list[str] | None = None
    max_new_tokens: int = Field(default=64, ge=1, le=4096)

    @field_validator("prompt")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            template_fields(value)
        return value

    @field_validator("options")
    @classmethod
    def _options(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else list(check_options(value))

    @model_validator(mode="after")
    def _fits(self) -> TaskFile:
        if self.metric != METRICS[self.type]:
            raise ValueError(f"a {self.type} task has the metric {METRICS[self.type]}, not {self.metric}")
        if self.type != "choice" and self.options:
            raise ValueError("options belong to tasks of type choice; remove them")
        if self.type == "choice" and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens belongs to tasks of type generate; remove it")
        return self


class SuiteFile(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_id: Literal["meristem/suite/v1"] = Field(default="meristem/suite/v1", alias="schema")
    name: str = Field(min_length=1)
    tasks: list[TaskFile] = Field(min_length=1)

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: list[TaskFile]) -> list[TaskFile]:
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two tasks are named {twice!r}; rename one")
        return tasks


@dataclass(frozen=True)
class Task:
    """One task with its items. ``max_new_tokens`` is ``None`` for ``choice``."""

    name: str
    type: TaskType
    metric: Metric
    kind: Kind
    items: tuple[Item, ...]
    max_new_tokens: int | None = None

    def to_document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "metric": self.metric,
            "kind": self.kind,
            "max_new_tokens": self.max_new_tokens,
            "items": [item.to_document() for item in self.items],
        }


@dataclass(frozen=True)
class Suite:
    """A suite with every item embedded; paths are gone, so the digest follows the content only."""

    name: str
    tasks: tuple[Task, ...]

    @cached_property
    def digest(self) -> str:
        return digest_document(self.to_document())

    @property
    def size(self) -> int:
        return sum(len(task.items) for task in self.tasks)

    def to_document(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "name": self.name, "tasks": [task.to_document() for task in self.tasks]}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Suite:
        """The inverse of ``to_document``; an unknown schema or a damaged document is refused."""
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise BadInput(f"suite document: schema {found!r} is unknown; this version reads {SCHEMA}")
        try:
            suite = cls(document["name"], tuple(_stored_task(task) for task in document["tasks"]))
        except (KeyError, TypeError, Refused) as error:
            raise BadInput(f"suite document: damaged or incomplete ({error})") from error
        if suite.to_document() != document:
            raise BadInput("suite document: it has keys or values that a suite does not carry")
        return suite

    def test_rows(self) -> list[dict[str, Any]]:
        """Items as rows for ``data.overlap.leaks``: ids are ``task/id``."""
        return [
            {"id": f"{task.name}/{item.id}", "prompt": item.chat(), "source": item.source}
            for task in self.tasks
            for item in task.items
        ]


def load_suite(path: str | Path) -> Suite:
    """Read a suite file and all its items; ``BadInput`` with file, line and remedy."""
    path = Path(path)
    file = _validate(path, _read_yaml(path))
    return Suite(file.name, tuple(_load_task(path, task) for task in file.tasks))


def _load_task(path: Path, task: TaskFile) -> Task:
    data = path.parent / task.data
    if not data.is_file():
        raise BadInput.at(
            path, None, f"task {task.name!r}: no data file {task.data!r}; paths are relative to the suite"
        )
    rules = Rules(task.type == "choice", task.prompt, task.system, tuple(task.options or ()))
    tokens = task.max_new_tokens if task.type == "generate" else None
    return Task(task.name, task.type, task.metric, task.kind, read_items(data, rules), tokens)


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise BadInput.at(path, None, "no such suite file; check the path")
    raw = path.read_bytes()
    if len(raw) > MAX_FILE:
        raise BadInput.at(path, None, "larger than 1 MiB; items belong in the data files")
    try:
        return yaml.safe_load(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput.at(path, None, f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable"
        raise BadInput.at(path, mark.line + 1 if mark else None, f"not YAML ({problem})") from error


def _validate(path: Path, content: Any) -> SuiteFile:
    if not isinstance(content, dict):
        raise BadInput.at(path, None, "empty or not a mapping; a suite has name and tasks")
    try:
        return SuiteFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "suite"
        raise BadInput.at(path, None, f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _stored_task(stored: dict[str, Any]) -> Task:
    if METRICS.get(stored["type"]) != stored["metric"] or stored["kind"] not in get_args(Kind):
        raise Refused(f"type {stored['type']!r}, metric {stored['metric']!r}, kind {stored['kind']!r}")
    items = tuple(_stored_item(item, stored["type"] == "choice") for item in stored["items"])
    if not items or len({item.id for item in items}) != len(items):
        raise Refused(f"task {stored['name']!r} has no items or repeats an id")
    return Task(
        stored["name"], stored["type"], stored["metric"], stored["kind"], items, stored["max_new_tokens"]
    )


def _stored_item(stored: dict[str, Any], choice: bool) -> Item:
    raw = {key: value for key, value in stored.items() if key != "source"}
    raw["options"] = stored["options"] or None
    made = make_item(raw, Rules(choice), "")
    return Item(made.id, made.messages, made.answer, made.options, made.slice, stored["source"])
