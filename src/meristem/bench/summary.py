"""Runs that may stand in one table, and what they come to: means and spreads over orders and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meristem.bench.lineup import JOINT, PER_TASK, SEQUENTIAL
from meristem.bench.results import Result
from meristem.evaluation.metrics import TaskMatrix
from meristem.store.canonical import digest_document

BASE = "untrained"
METRICS = ("acc", "bwt", "fwt", "fwt_trained", "forgetting", "plasticity")
_OWN = ("order", "tasks", "method", "seed", "code")  # what runs of one table may differ in


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over runs; None where no run has a value."""

    mean: float | None
    sd: float | None
    n: int

    def shown(self, digits: int = 3) -> str:
        if self.mean is None:
            return "-"
        mean = round(self.mean, digits) + 0.0  # no "-0.000"
        return f"{mean:.{digits}f}" + (f" ± {self.sd:.{digits}f}" if self.sd is not None else "")


def spread(values: Iterable[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None, 0)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Line:
    """One run, with s_i of the per-task run of its seed where there is one."""

    result: Result
    single: list[float] | None

    @cached_property
    def matrix(self) -> TaskMatrix:
        return TaskMatrix(self.result["scores"], self.result["baseline"], self.single)

    @property
    def plasticity(self) -> float | None:
        """``mean_i A[i,i]``: the score on each task right after it was learned."""
        diagonal = [row[at] for at, row in enumerate(self.matrix.scores)]
        known = [value for value in diagonal if value is not None]
        return math.fsum(known) / len(known) if len(known) == len(diagonal) else None

    def metric(self, name: str) -> float | None:
        if name == "plasticity":
            return self.plasticity
        if name == "acc":  # of per-task runs it is the mean of s_i
            return float(self.result["acc"])
        if name == "fwt_trained" and self.result["single"]:
            return None  # a task trained alone has nothing before it
        value: float | None = getattr(self.matrix, name)
        return value

    def last_score(self, task: str) -> float | None:
        """The score on ``task`` in the end; of a per-task run its own."""
        at = self.result["tasks"].index(task)
        own = self.result["single"]
        score: float | None = own[at] if own else self.matrix.scores[-1][at]
        return score

    def score_at(self, step: int, task: str) -> float | None:
        """A[step, task]; step 0 is the untrained model."""
        at = self.result["tasks"].index(task)
        if step == 0:
            baseline = self.matrix.baseline
            return baseline[at] if baseline else None
        return self.matrix.scores[step - 1][at]


@dataclass(frozen=True)
class Method:
    """Every run of one method in a group."""

    name: str
    lines: list[Line]

    def metric(self, name: str) -> Spread:
        return spread(line.metric(name) for line in self.lines)

    def last_score(self, task: str) -> Spread:
        return spread(line.last_score(task) for line in self.lines)

    @property
    def seconds(self) -> Spread:
        return spread(line.result["train_seconds"] for line in self.lines)

    @property
    def steps(self) -> int:
        """Optimizer steps per run."""
        return max(sum(update["steps"] for update in line.result["updates"]) for line in self.lines)

    @property
    def ordered(self) -> bool:
        return self.name not in (PER_TASK, JOINT)

    def in_order(self, order: str) -> list[Line]:
        return [line for line in self.lines if line.result["order"] == order]


@dataclass(frozen=True)
class Group:
    """Runs under the same conditions: protocol, model, data, recipe, engine."""

    protocol: str
    conditions: dict[str, Any]
    methods: list[Method]

    @property
    def tasks(self) -> list[str]:
        """In the order of the first run that follows one."""
        ordered = [method for method in self.methods if method.ordered] or self.methods
        return list(ordered[0].lines[0].result["tasks"])

    @property
    def orders(self) -> dict[str, list[str]]:
        return {
            line.result["order"]: line.result["tasks"]
            for method in self.methods
            if method.ordered
            for line in sorted(method.lines, key=lambda line: str(line.result["order"]))
        }

    @property
    def untrained(self) -> Spread:
        """Mean b_i over tasks; the same for every run."""
        baselines = self.methods[0].lines[0].result["baseline"]
        return spread([math.fsum(baselines) / len(baselines)])

    def method(self, name: str) -> Method | None:
        return next((method for method in self.methods if method.name == name), None)


def groups(results: Sequence[Result]) -> list[Group]:
    """Results by protocol and conditions; the largest group of a protocol first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(digest_document(conditions(result)), []).append(result)
    made = [_group(members) for members in found.values()]
    return sorted(made, key=lambda g: (g.protocol, -sum(len(m.lines) for m in g.methods)))


def conditions(result: Result) -> dict[str, Any]:
    """What runs of one table share: everything but order, method, seed and the versions of libraries."""
    settings = {key: value for key, value in result["settings"].items() if key not in _OWN}
    recipe = {key: value for key, value in settings["recipe"].items() if key not in ("methods", "seed")}
    engine = {key: value for key, value in settings["engine"].items() if key != "libraries"}
    return {**settings, "recipe": recipe, "engine": engine}


def _group(members: list[Result]) -> Group:
    singles = {r["seed"]: dict(zip(r["tasks"], r["single"], strict=True)) for r in members if r["single"]}
    lines: dict[str, list[Line]] = {}
    for result in members:
        own = singles.get(result["seed"])
        single = [own[task] for task in result["tasks"]] if own else None
        lines.setdefault(result["method"], []).append(Line(result, single))
    methods = [Method(name, found) for name, found in lines.items()]
    return Group(members[0]["protocol"], conditions(members[0]), sorted(methods, key=_rank))


def _rank(method: Method) -> tuple[int, float]:
    """Sequential first, then methods from the best, then the two bounds."""
    place = {SEQUENTIAL: 0, JOINT: 2, PER_TASK: 3}.get(method.name, 1)
    return place, -(method.metric("acc").mean or 0.0)
