"""Run a suite on an engine. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meristem.errors import BadInput
from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.suites import Suite, Task

if TYPE_CHECKING:
    from meristem.engine.load import Engine

Progress = Callable[[int, int], None]


def evaluate(engine: Engine, suite: Suite, progress: Progress | None = None) -> list[ItemResult]:
    """One result per item, in the suite's order. ``progress(done items, all items)``.

    choice: the option with the highest summed log-likelihood, the first of equals.
    generate: greedy text; right when it equals the answer, both stripped.
    """
    results: list[ItemResult] = []
    runners = {"choice": _choice, "generate": _generate}
    for task in suite.tasks:
        try:
            results += runners[task.type](engine, task, _shifted(progress, len(results), suite.size))
        except BadInput as error:
            raise BadInput(f"suite {suite.name!r}, task {task.name!r}: {error}") from error
    return results


def _shifted(progress: Progress | None, done_before: int, total: int) -> Progress | None:
    return (lambda done, _: progress(done_before + done, total)) if progress else None


def _prompts(engine: Engine, task: Task) -> list[list[int]]:
    from meristem.engine.prompts import encode_prompt

    prompts = []
    for item in task.items:
        try:
            prompts.append(encode_prompt(engine, item.chat()))
        except BadInput as error:
            raise BadInput(f"item {item.id!r}: {error}") from error
    return prompts


def _choice(engine: Engine, task: Task, progress: Progress | None) -> list[ItemResult]:
    from meristem.engine.prompts import encode_option
    from meristem.engine.score import option_logprobs

    contexts = _prompts(engine, task)
    options = [[encode_option(engine, option) for option in item.options] for item in task.items]
    scores = option_logprobs(engine, contexts, options, progress)
    return [_choice_result(task, item, values) for item, values in zip(task.items, scores, strict=True)]


def _choice_result(task: Task, item: Item, logprobs: Sequence[float]) -> ItemResult:
    best = max(range(len(logprobs)), key=lambda k: (logprobs[k], -k))
    rounded = {option: float(f"{value:.6g}") for option, value in zip(item.options, logprobs, strict=True)}
    prediction = item.options[best]
    return _result(task, item, prediction, prediction == item.answer, {"logprobs": rounded})


def _generate(engine: Engine, task: Task, progress: Progress | None) -> list[ItemResult]:
    from meristem.engine.generate import generate

    texts = generate(engine, _prompts(engine, task), task.max_new_tokens or 64, progress)
    return [
        _result(task, item, text.strip(), text.strip() == item.answer.strip(), {})
        for item, text in zip(task.items, texts, strict=True)
    ]


def _result(task: Task, item: Item, prediction: str, right: bool, detail: dict[str, Any]) -> ItemResult:
    return ItemResult(
        task=task.name,
        id=item.id,
        slice=item.slice,
        score=float(right),
        prediction=prediction,
        answer=item.answer,
        detail=detail,
    )
