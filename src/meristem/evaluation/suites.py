"""Evaluation suites: what is measured, as one frozen value whose digest follows the content only.

``suite_files`` reads them from YAML. A stored document holds keys that came later only where they differ from
their defaults, so that a suite keeps its digest from one version of Meristem to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import ValidationError

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message
from meristem.evaluation.tasks.base import Format, TaskType, Truncation, Unit, type_named
from meristem.store.canonical import digest_document

SCHEMA = "meristem/suite/v1"

UNITS = {"share": "shares", "bits_per_byte": "bits per byte", "nats": "nats"}
Kind = Literal["target", "general", "instruction", "safety"]


@dataclass(frozen=True)
class Task:
    """One task with its items.

    ``shots`` are worked examples that stand before every item's own messages (after its system message).
    ``format``: prompts through the model's chat template, or as plain text. ``truncation``: what happens to a
    prompt longer than the model's window.
    """

    name: str
    type: str
    settings: TaskType
    kind: Kind
    items: tuple[Item, ...]
    format: Format = "chat"
    truncation: Truncation = "refuse"
    shots: tuple[Message, ...] = ()

    @property
    def metric(self) -> str:
        return self.settings.metric

    def chat(self, item: Item) -> list[dict[str, str]]:
        """The messages that the model is shown for ``item``."""
        first = 1 if item.messages and item.messages[0].role == "system" else 0
        messages = (*item.messages[:first], *self.shots, *item.messages[first:])
        return [message.to_document() for message in messages]

    def to_document(self) -> dict[str, Any]:
        late = {
            "format": self.format if self.format != "chat" else None,
            "truncation": self.truncation if self.truncation != "refuse" else None,
            "shots": [shot.to_document() for shot in self.shots],
        }
        return {
            "name": self.name,
            "type": self.type,
            "kind": self.kind,
            "max_new_tokens": None,  # a key of every task from the beginning
            **self.settings.document(),
            "items": [item.to_document() for item in self.items],
            **{key: value for key, value in late.items() if value},
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

    @property
    def unit(self) -> Unit:
        """Of every score."""
        return self.tasks[0].settings.unit

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
            one_unit(suite.tasks)
        except (KeyError, TypeError, AttributeError, Refused, ValidationError) as error:
            raise BadInput(f"suite document: damaged or incomplete ({_first_line(error)})") from error
        if suite.to_document() != document:
            raise BadInput("suite document: it has keys or values that a suite does not carry")
        return suite

    def test_rows(self) -> list[dict[str, Any]]:
        """Items as rows for leak checks: ids are ``task/id``; ``text``, or the item's own ``prompt``, and ``source``."""
        return [
            {"id": f"{task.name}/{item.id}", "answer": item.answer, **_input(item)}
            for task in self.tasks
            for item in task.items
        ]


def one_unit(tasks: tuple[Task, ...]) -> None:
    """``Refused`` when scores of different units would be averaged and compared as one."""
    units = {task.settings.unit: task.name for task in reversed(tasks)}
    if len(units) > 1:
        told = " and ".join(f"{name!r} in {UNITS[unit]}" for unit, name in units.items())
        raise Refused(
            f"the tasks of a suite are scored in one unit, and here are {told}; make a suite of each"
        )


def _input(item: Item) -> dict[str, Any]:
    if item.text is not None:
        return {"text": item.text}
    return {"prompt": item.chat(), "source": item.source}


def _stored_task(stored: dict[str, Any]) -> Task:
    if stored["kind"] not in get_args(Kind):
        raise Refused(f"kind {stored['kind']!r}")
    way = stored.get("format", "chat"), stored.get("truncation", "refuse")
    if way[0] not in get_args(Format) or way[1] not in get_args(Truncation):
        raise Refused(f"format {way[0]!r}, truncation {way[1]!r}")
    known = {"name", "type", "kind", "items", "format", "truncation", "shots"}
    fields = {key: value for key, value in stored.items() if key not in known}
    if fields.get("max_new_tokens", 0) is None:
        del fields["max_new_tokens"]
    settings = type_named(stored["type"]).model_validate(fields)
    items = tuple(Item.from_document(item) for item in stored["items"])
    if not items or len({item.id for item in items}) != len(items):
        raise Refused(f"task {stored['name']!r} has no items or repeats an id")
    for item in items:
        settings.check(item)
    return Task(
        stored["name"],
        stored["type"],
        settings,
        stored["kind"],
        items,
        *way,
        tuple(Message(**shot) for shot in stored.get("shots", ())),
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors()[0]
        return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
    return str(error)
