"""What a type of suite task is: the keys that it understands, its items, how it is run and scored.

A type is a frozen pydantic model registered by name under the entry-point group ``meristem.tasks``; its fields are
the keys of the YAML task that belong to it alone, and with them a stored suite rebuilds it. See ``choice.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult

if TYPE_CHECKING:
    from meristem.engine.batching import Journal
    from meristem.engine.load import Engine
    from meristem.evaluation.items import Item
    from meristem.evaluation.suites import Task

GROUP = "meristem.tasks"

Unit = Literal["share", "bits_per_byte", "nats"]
Format = Literal["chat", "text"]
Truncation = Literal["refuse", "left", "right"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """What an evaluation lends to a task while it runs: whom to tell, and where finished batches are kept.

    ``journal(part)`` keeps the batches of one pass over the task (``"options"``, ``"samples"``).
    """

    progress: Progress | None = None
    journal: Callable[[str], Journal | None] = lambda part: None


class TaskType(BaseModel):
    """One type of task with its settings. ``metric`` names what a score is.

    ``KEYS`` are the keys of an item that the type reads; ``id``, ``slice``, ``cluster`` and, unless ``PROMPTED``
    is false, ``prompt`` or ``messages`` are every type's. ``INPUTS`` are fields that shape the items when a suite
    is read and are no part of it afterwards. ``BRINGS_ITEMS``: they come from a harness, not from a data file.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    KEYS: ClassVar[frozenset[str]] = frozenset()
    INPUTS: ClassVar[frozenset[str]] = frozenset()
    PROMPTED: ClassVar[bool] = True
    BRINGS_ITEMS: ClassVar[bool] = False
    metric: str

    @property
    def unit(self) -> Unit:
        """Of a score; the tasks of a suite share one. Higher is better in every unit."""
        return "share"

    def parts(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The fields of an ``Item`` that this type reads from a line of data; ``Refused`` says what is wrong."""
        raise NotImplementedError

    def check(self, item: Item) -> None:
        """``Refused`` for an item that this type cannot score, whether just read or stored long ago."""

    def collect(self, folder: Path) -> tuple[TaskType, tuple[Item, ...]]:
        """Of a task that brings its own items: settings that pin it, and the items. ``folder``: the suite file's."""
        raise Refused("it has no data; name the file that holds its items")

    def shown(self, item: Item) -> str:
        """The answer that a worked example gives. ``Refused`` where an item's answer is none that a model would give."""
        return item.answer

    def prepare(self, task: Task) -> None:
        """Called for every task before anything is computed; ``BadInput`` when the task cannot be run here."""

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        """One result per item, in the task's order."""
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """The settings as they are stored: ``metric``, and what differs from its default."""
        kept = self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.INPUTS))
        return {"metric": self.metric, **kept}


def result(
    task: Task, item: Item, prediction: str, score: float, detail: dict[str, Any] | None = None
) -> ItemResult:
    """The row of one item; keys that most rows lack are written only where they say something."""
    row = ItemResult(
        task=task.name,
        id=item.id,
        slice=item.slice,
        score=float(score),
        prediction=prediction,
        answer=item.answer,
        detail=detail or {},
    )
    if item.cluster is not None:
        row["cluster"] = item.cluster
    if task.settings.unit != "share":
        row["unit"] = task.settings.unit
    return row


def for_each(items: Sequence[Item], do: Callable[[Item], Any]) -> list[Any]:
    """``do(item)`` of every item; a ``BadInput`` gets the item's id."""
    made = []
    for item in items:
        try:
            made.append(do(item))
        except BadInput as error:
            raise BadInput(f"item {item.id!r}: {error}") from error
    return made


@cache
def registered() -> dict[str, type[TaskType]]:
    """Every installed type of task, by name."""
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}


def type_named(name: str) -> type[TaskType]:
    found = registered().get(name)
    if found is None:
        raise Refused(f"type: {name!r} is not known; types here: {', '.join(sorted(registered()))}")
    return found
