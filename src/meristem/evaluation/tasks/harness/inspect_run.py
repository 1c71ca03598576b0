"""Run a rebuilt task of Inspect: its solvers and scorers over our engine, its log in a folder that goes away."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import inspect_ai
from inspect_ai.model import GenerateConfig, Model
from inspect_ai.scorer import value_to_float
from inspect_ai.solver import solver

from meristem.engine.load import Engine
from meristem.errors import BadInput
from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run, result
from meristem.evaluation.tasks.harness.inspect_model import EngineAPI, Rounds
from meristem.evaluation.tasks.harness.inspect_task import InspectTask
from meristem.evaluation.tasks.harness.shared import first_line

TRACES = "INSPECT_TRACE_FILE"
PLAIN = (str, int, float, bool)
GRADES = ("C", "P", "I", "N")
TRUTHS = ("yes", "true", "no", "false")


def run(engine: Engine, task: Task, settings: InspectTask, built: Any, run: Run) -> list[ItemResult]:
    """One row per sample, in order; the mean over its epochs."""
    log, rounds = solve(engine, task, settings, built, run)
    places = {item.id: at for at, item in enumerate(task.items)}
    found: list[list[Any]] = [[] for _ in task.items]
    for sample in log.samples or ():
        found[places[str(sample.id)]].append(sample)
    return [_row(task, settings, item, found[at], rounds, at) for at, item in enumerate(task.items)]


def solve(engine: Engine, task: Task, settings: InspectTask, built: Any, run: Run) -> tuple[Any, Rounds]:
    """Inspect's own log of the evaluation, and the rounds in which the engine answered it."""
    places = {item.id: at for at, item in enumerate(task.items)}
    epochs = built.epochs or 1
    rounds = Rounds(engine, task, run, len(places) * epochs, settings.max_new_tokens)
    built.solver = _within_rounds(built.solver, rounds, places)
    log = _evaluate(built, rounds, len(places))
    if rounds.failure:
        raise rounds.failure
    if log.status == "cancelled":
        raise KeyboardInterrupt
    if log.status != "success":
        raise BadInput(
            f"Inspect stopped ({first_line(Exception(log.error.message if log.error else log.status))})"
        )
    return log, rounds


def _within_rounds(inner: Any, rounds: Rounds, places: dict[str, int]) -> Any:
    @solver(name="meristem_rounds")
    def counted() -> Any:
        async def solving(state: Any, generate: Any) -> Any:
            with rounds.solving((places[str(state.sample_id)], state.epoch)):
                return await inner(state, generate)

        return solving

    return counted()


def _evaluate(built: Any, rounds: Rounds, samples: int) -> Any:
    with tempfile.TemporaryDirectory() as folder, _quiet(folder):
        model = Model(EngineAPI(rounds), GenerateConfig(max_connections=rounds.expected))
        [log] = inspect_ai.eval(
            built,
            model=model,
            display="none",
            log_dir=folder,
            log_format="json",
            log_level="critical",
            log_realtime=False,
            log_model_api=False,
            limit=samples,
            max_samples=rounds.expected,
            fail_on_error=True,
            acp_server=False,
            ctl_server=False,
        )
        return log


@contextmanager
def _quiet(folder: str) -> Iterator[None]:
    """Inspect sets up logging, a file of traces and a hook for exceptions; all are put back."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    traces = os.environ.setdefault(TRACES, f"{folder}/trace.log")
    try:
        yield
    finally:
        if traces.startswith(folder):
            del os.environ[TRACES]
        root.handlers, sys.excepthook = handlers, hook
        root.setLevel(level)


def _row(
    task: Task, settings: InspectTask, item: Item, solved: list[Any], rounds: Rounds, at: int
) -> ItemResult:
    values = [_value(settings.metric, item, sample) for sample in solved]
    if not values:
        raise BadInput(f"item {item.id!r}: Inspect gave it no score")
    detail: dict[str, Any] = {"tokens": rounds.tokens.get(at, 0)}
    detail |= {"truncated": rounds.cuts[at]} if at in rounds.cuts else {}
    detail |= {"scores": values} if len(values) > 1 else {}
    return result(task, item, _said(settings.metric, solved[0]), math.fsum(values) / len(values), detail)


def _value(metric: str, item: Item, sample: Any) -> float:
    """C 1, P 0.5, I and N 0, as Inspect counts them; a number as it is. ``BadInput`` outside 0 to 1."""
    name, _, key = metric.partition("/")
    score = (sample.scores or {}).get(name)
    value = score.value if score is not None else None
    if key and isinstance(value, dict):
        value = value.get(key)
    if not isinstance(value, PLAIN):
        keys = (
            f"; name one of its values: {', '.join(f'{name}/{k}' for k in value)}"
            if isinstance(value, dict)
            else ""
        )
        raise BadInput(
            f"item {item.id!r}: the score of {metric!r} is {value!r}, and one number is needed{keys}"
        )
    # Inspect counts words that it does not know as 0
    number = float(value_to_float()(value)) if _is_known(value) else math.nan
    if not 0 <= number <= 1:
        raise BadInput(
            f"item {item.id!r}: the score of {metric!r} is {value!r}, and a score is a share from 0 to 1"
        )
    return number


def _is_known(value: Any) -> bool:
    if not isinstance(value, str) or value in GRADES or value.lower() in TRUTHS:
        return True
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _said(metric: str, sample: Any) -> str:
    score = sample.scores[metric.partition("/")[0]]
    return str(score.answer if score.answer is not None else sample.output.completion)
