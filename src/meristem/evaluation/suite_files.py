"""A suite as people write it: a YAML file and files of test items become a ``Suite``.

.. code-block:: yaml

    schema: meristem/suite/v1          # optional
    name: support-core
    tasks:
      - name: topics
        type: choice                   # choice | generate | perplexity | preference | lm-eval | inspect
        kind: target                   # target | general | instruction | safety
        data: topics.jsonl             # relative to this file
        sha256: 9f86d0...              # optional: refuse the file when its bytes are others
        metric: accuracy               # optional where the type has one metric only
        prompt: "Topic of: {text}"     # optional; else items have "prompt" or "messages"
        system: "Answer in one word."  # optional
        format: chat                   # chat (the model's template, as served) or text
        truncation: refuse             # refuse | left | right: prompts longer than the model's window
        few_shot: {data: shots.jsonl, count: 4, seed: 0}
        options: [billing, delivery]   # this and further keys belong to the type (``evaluation/tasks``)

A line of ``data``: ``{"id", "prompt" | "messages" | template fields, "slice", "cluster"}`` and the type's own keys,
such as ``"answer"``.
"""

from __future__ import annotations

import hashlib
import random
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from meristem.config import Loader
from meristem.data.formats import fold
from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message, Rules, read_items, template_fields
from meristem.evaluation.suites import SCHEMA, Kind, Suite, Task, one_unit
from meristem.evaluation.tasks.base import Format, TaskType, Truncation, type_named

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_FILE = 1 << 20


class FewShot(BaseModel):
    """Worked examples: ``count`` of the items in ``data``, drawn with ``seed``, shown in front of every item."""

    model_config = ConfigDict(extra="forbid", strict=True)

    data: str = Field(min_length=1)
    count: int = Field(ge=1, le=64)
    seed: int = 0


class TaskFile(BaseModel):
    """What every task may say; further keys are its type's."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(min_length=1)
    type: str = Field(min_length=1)
    kind: Kind
    data: str | None = Field(default=None, min_length=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    prompt: str | None = None
    system: str | None = Field(default=None, min_length=1)
    format: Format = "chat"
    truncation: Truncation = "refuse"
    few_shot: FewShot | None = None

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        type_named(value)
        return value

    @field_validator("prompt")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            template_fields(value)
        return value


class SuiteFile(BaseModel):
    """The YAML file; ``tasks`` are checked one by one, each with its type's keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_id: str = Field(default=SCHEMA, alias="schema", pattern=f"^{SCHEMA}$")
    name: str = Field(min_length=1)
    tasks: list[Any] = Field(min_length=1)


def load_suite(path: str | Path) -> Suite:
    """Read a suite file and all its items; ``BadInput`` with file, line and remedy."""
    path = Path(path)
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise BadInput.at(path, None, "empty or not a mapping; a suite has name and tasks")
    file = _validate(path, "", SuiteFile, content)
    read = [_task_file(path, at, raw) for at, raw in enumerate(file.tasks)]
    names = [task.name for task, _ in read]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput.at(path, None, f"tasks: two tasks are named {twice!r}; rename one")
    tasks = tuple(_load_task(path, task, settings) for task, settings in read)
    try:
        one_unit(tasks)
    except Refused as error:
        raise BadInput.at(path, None, str(error)) from None
    suite = Suite(file.name, tasks)
    try:
        _ = suite.digest
    except ValueError as error:  # what JSON cannot carry: infinities, integers beyond 2**53
        raise BadInput.at(path, None, f"a number in it cannot be stored ({error}); correct it") from None
    return suite


def _task_file(path: Path, at: int, raw: Any) -> tuple[TaskFile, TaskType]:
    where = f"tasks.{at}"
    if not isinstance(raw, dict):
        raise BadInput.at(path, None, f"{where}: not a mapping; a task has name, type, data and kind")
    task = _validate(path, where, TaskFile, _spelled_out(raw))
    return task, _validate(path, where, type_named(task.type), dict(task.model_extra or {}))


def _spelled_out(raw: dict[str, Any]) -> dict[str, Any]:
    """``type: "lm-eval:arc_easy"`` is ``type: lm-eval`` with ``task: arc_easy``."""
    kind, colon, name = str(raw.get("type")).partition(":")
    return {**raw, "type": kind, "task": name} if colon and "task" not in raw else raw


def _load_task(path: Path, task: TaskFile, settings: TaskType) -> Task:
    try:
        rules = Rules(settings, task.prompt, task.system)
        if task.data is None or settings.BRINGS_ITEMS:
            settings, items = _collected(path, task, settings)
        else:
            items = _read(path, task, task.data, rules)
        if task.sha256 and task.data:
            _check_digest(path.parent / task.data, task.sha256)
        shots = _shots(path, task, rules, items) if task.few_shot else ()
    except Refused as error:
        raise BadInput.at(path, None, f"task {task.name!r}: {error}") from None
    return Task(task.name, task.type, settings, task.kind, items, task.format, task.truncation, shots)


def _collected(path: Path, task: TaskFile, settings: TaskType) -> tuple[TaskType, tuple[Item, ...]]:
    unused = [
        key for key in ("data", "prompt", "system", "sha256", "few_shot") if getattr(task, key) is not None
    ]
    if settings.BRINGS_ITEMS and unused:
        raise Refused(f"a {task.type} task brings its own items; remove {', '.join(unused)}")
    return settings.collect(path.parent)


def _read(path: Path, task: TaskFile, name: str, rules: Rules) -> tuple[Item, ...]:
    data = path.parent / name
    if not data.is_file():
        raise Refused(f"no data file {name!r}; paths are relative to the suite")
    if not rules.settings.PROMPTED and (task.prompt or task.system):
        raise Refused(f"a {task.type} task has no prompt; remove prompt and system")
    return read_items(data, rules)


def _check_digest(data: Path, wanted: str) -> None:
    found = hashlib.sha256(data.read_bytes()).hexdigest()
    if found != wanted:
        raise BadInput.at(
            data, None, f"its content changed: sha256 is {found}, and the suite asks for {wanted}"
        )


def _shots(path: Path, task: TaskFile, rules: Rules, items: tuple[Item, ...]) -> tuple[Message, ...]:
    """User and assistant messages in turn. ``Refused`` when an example is a test item."""
    assert task.few_shot is not None
    if not rules.settings.PROMPTED or task.data is None:
        raise Refused(f"few_shot: a {task.type} task takes no examples here; remove it")
    examples = _read(path, task, task.few_shot.data, Rules(rules.settings, task.prompt))
    tested = {_question(item): item.id for item in items}
    for example in examples:
        if (item := tested.get(_question(example))) is not None:
            raise Refused(
                f"few_shot: example {example.id!r} is the test item {item!r}; take it out of the examples"
            )
        if any(message.role == "system" for message in example.messages):
            raise Refused(
                f"few_shot: example {example.id!r} has a system message; a conversation has one, the task's or the item's"
            )
    if len(examples) < task.few_shot.count:
        raise Refused(
            f"few_shot: {task.few_shot.data} has {len(examples)} examples, not {task.few_shot.count}"
        )
    drawn = random.Random(task.few_shot.seed).sample(examples, task.few_shot.count)
    return tuple(
        message
        for shot in drawn
        for message in (*shot.messages, Message("assistant", rules.settings.shown(shot)))
    )


def _question(item: Item) -> str:
    return fold(" ".join(m.content for m in item.messages if m.role != "system"))


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise BadInput.at(path, None, "no such suite file; check the path")
    raw = path.read_bytes()
    if len(raw) > MAX_FILE:
        raise BadInput.at(path, None, "larger than 1 MiB; items belong in the data files")
    try:
        return yaml.load(raw.decode("utf-8-sig"), Loader=Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise BadInput.at(path, None, f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable"
        raise BadInput.at(path, mark.line + 1 if mark else None, f"not YAML ({problem})") from error


def _validate(path: Path, where: str, kind: Any, content: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A misspelt key is unknown, and often missing as well: the first says more.
        first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        place = ".".join([*([where] if where else []), *map(str, first["loc"])]) or "suite"
        raise BadInput.at(path, None, f"{place}: {_complaint(kind, first)}") from None


def _complaint(kind: type[BaseModel], detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "missing; add it"
    if detail["type"] == "extra_forbidden":
        told = "unknown key; check its spelling"
        if len(detail["loc"]) == 1:  # deeper ones belong to a model inside of ``kind``
            keys = {**kind.model_fields, **(TaskFile.model_fields if issubclass(kind, TaskType) else {})}
            near = get_close_matches(str(detail["loc"][0]), keys, 1)
            told = f"unknown key; did you mean {near[0]!r}?" if near else told
        return told
    return detail["msg"].removeprefix("Value error, ")
