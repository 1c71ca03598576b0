"""One run: train task by task with the rooms below, measure after each task, keep the numbers.

A run is a model line in the store; every training is an update there, so whatever was cut off goes on where it was.
Nothing is released: the parent of an update is the version before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meristem.bench.lineup import JOINT, PER_TASK, Run
from meristem.bench.material import Stocked
from meristem.config import Recipe
from meristem.ecosystem import ledger, models, versions
from meristem.ecosystem.records import UpdateOutcome
from meristem.ecosystem.versions import VersionEntry
from meristem.evaluation.metrics import TaskMatrix
from meristem.evaluation.service import Evaluator
from meristem.store.store import Store, read_document
from meristem.training import recipes, updates

Progress = Callable[[str, int, int, str], None]
Row = list[float | None]


@dataclass
class Bench:
    """A store with the base model and the tasks' material in it, and what is needed to train and measure."""

    store: Store
    actor: str
    base: str
    tasks: Mapping[str, Stocked]
    evaluator: Evaluator
    progress: Progress | None = None

    def execute(self, run: Run) -> dict[str, Any]:
        """Train and measure ``run``; what was done before is not done again. The outcome for its result file."""
        started = time.monotonic()
        done = {PER_TASK: _PerTask, JOINT: _Joint}.get(run.method.spec, _Sequence)(self, run)
        first = self._start(run)
        baseline = [self.score(first, task) for task in run.tasks]
        done.train(first)
        single = done.single
        document = TaskMatrix(done.rows, baseline, single).to_document()
        if single is not None:
            document["acc"] = math.fsum(single) / len(single)
        return {
            "protocol": run.protocol,
            "order": run.order,
            "method": run.method.spec,
            "seed": run.seed,
            "tasks": list(run.tasks),
            **document,
            "updates": done.updates,
            "train_seconds": round(sum(update["seconds"] for update in done.updates), 1),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _start(self, run: Run) -> VersionEntry:
        """The line's first version, which is the base model itself."""
        return models.add(self.store, self.actor, run.line, "industrial", None, self.base)

    def train(
        self, parent: VersionEntry, tasks: Sequence[str], recipe: Recipe
    ) -> tuple[VersionEntry, dict[str, Any]]:
        """The version that ``recipe`` makes of ``parent`` with the data of ``tasks``, and what its training cost."""
        settled = recipes.settled(self.store, recipe, parent)
        data = [self.tasks[task].train.digest for task in tasks]
        entry = updates.open_update(self.store, self.actor, parent=parent, data=data, recipe=settled)
        if entry.status != "done":
            self.evaluator.release_memory()
        made = updates.run(self.store, self.actor, entry, self.progress)
        with self.store.database.read() as connection:
            done = ledger.find(connection, entry.id)
            assert done.result is not None
            outcome = UpdateOutcome.from_document(read_document(connection, done.result))
            made = versions.by_digest(connection, outcome.version)
        cost = {"steps": outcome.steps, "tokens": outcome.tokens, "seconds": outcome.seconds}
        loss = [point["loss"] for point in outcome.curve if "loss" in point]
        return made, {
            "tasks": list(tasks),
            "version": made.label,
            "content": made.content,
            **cost,
            "last_loss": loss[-1] if loss else None,
        }

    def score(self, version: VersionEntry, task: str) -> float:
        return self.evaluator.task_score(version, self.tasks[task].suite, task)


class _Sequence:
    """Task after task, each training going on from the last; after each, every task is measured."""

    def __init__(self, bench: Bench, run: Run):
        self.bench, self.run = bench, run
        self.rows: list[Row] = []
        self.updates: list[dict[str, Any]] = []
        self.single: list[float] | None = None

    def train(self, first: VersionEntry) -> None:
        version = first
        for task in self.run.tasks:
            version, update = self.bench.train(version, [task], self.run.recipe)
            self.updates.append(update)
            self.rows.append([self.bench.score(version, each) for each in self.run.tasks])


class _PerTask(_Sequence):
    """Each task alone from the start: ``single[i]`` = s_i, on the diagonal of an else empty matrix."""

    def train(self, first: VersionEntry) -> None:
        self.single = []
        for at, task in enumerate(self.run.tasks):
            version, update = self.bench.train(first, [task], self.run.recipe)
            self.updates.append(update)
            self.single.append(self.bench.score(version, task))
            row: Row = [None] * len(self.run.tasks)
            row[at] = self.single[-1]
            self.rows.append(row)


class _Joint(_Sequence):
    """All tasks at once, with the steps of all of them; only the last row of the matrix is measured."""

    def train(self, first: VersionEntry) -> None:
        tasks, recipe = self.run.tasks, self.run.recipe
        if recipe.max_steps is not None:
            recipe = recipe.model_copy(update={"max_steps": recipe.max_steps * len(tasks)})
        version, update = self.bench.train(first, tasks, recipe)
        self.updates.append(update)
        self.rows = [[None] * len(tasks) for _ in tasks[1:]]
        self.rows.append([self.bench.score(version, task) for task in tasks])
