"""Run a suite on an engine. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.base import Progress, Run

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.journal import JournalFile


def evaluate(
    engine: Engine,
    suite: Suite,
    progress: Progress | None = None,
    journal: JournalFile | None = None,
    *,
    prepared: bool = False,
) -> list[ItemResult]:
    """One result per item, in the suite's order. ``progress(done items, all items)``.

    Batches that ``journal`` holds are not computed again; the results are the same. ``prepared``: by the
    caller, who may do so before a model is loaded.
    """
    if not prepared:
        prepare(suite)
    results: list[ItemResult] = []
    for task in suite.tasks:
        run = Run(_shifted(progress, len(results), suite.size), _parts(journal, task))
        results += _named(suite, task, lambda task=task, run=run: task.settings.run(engine, task, run))
    return results


def prepare(suite: Suite) -> None:
    """Raises ``BadInput`` for a task that cannot be run here, before anything is computed."""
    for task in suite.tasks:
        _named(suite, task, lambda task=task: task.settings.prepare(task))


def _named(suite: Suite, task: Task, do: Callable) -> list[ItemResult]:
    try:
        return do()
    except BadInput as error:
        raise BadInput(f"suite {suite.name!r}, task {task.name!r}: {error}") from error


def _shifted(progress: Progress | None, done_before: int, total: int) -> Progress | None:
    return (lambda done, _: progress(done_before + done, total)) if progress else None


def _parts(journal: JournalFile | None, task: Task) -> Callable:
    return (lambda part: journal.part(f"{task.name}/{part}")) if journal else (lambda part: None)
