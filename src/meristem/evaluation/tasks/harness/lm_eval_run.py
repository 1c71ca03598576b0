"""Run a rebuilt task of lm-evaluation-harness: its evaluator, filters and metrics over our engine. Imports lm_eval."""

from __future__ import annotations

import math
from typing import Any

from lm_eval.evaluator import evaluate

from meristem.engine.load import Engine
from meristem.errors import BadInput
from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run, result
from meristem.evaluation.tasks.choice import rounded
from meristem.evaluation.tasks.harness.lm_eval_frozen import harness_ways
from meristem.evaluation.tasks.harness.lm_eval_model import EngineLM
from meristem.evaluation.tasks.harness.lm_eval_task import LmEval

HASHES = ("doc_hash", "prompt_hash", "target_hash")


def run(engine: Engine, task: Task, settings: LmEval, built: Any, run: Run) -> list[ItemResult]:
    """One row per document, in order. ``score`` is lm-eval's own value of the metric for that document."""
    lm = EngineLM(engine, task, run)
    with harness_ways():
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {settings.task: built}},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=lm.templated,
            fewshot_as_multiturn=True,
        )
    samples = {
        sample["doc_id"]: sample
        for sample in found["samples"][settings.task]
        if sample["filter"] == settings.filter
    }
    return [_row(task, settings, item, samples[at], _cost(lm, at)) for at, item in enumerate(task.items)]


def _cost(lm: EngineLM, document: int) -> dict[str, int]:
    cut = lm.cuts.get(document)
    return {"tokens": lm.tokens[document], **({"truncated": cut} if cut else {})}


def _row(
    task: Task, settings: LmEval, item: Item, sample: dict[str, Any], cost: dict[str, int]
) -> ItemResult:
    if settings.metric not in sample:
        raise BadInput(f"item {item.id!r}: lm-eval gave it no {settings.metric}; it gave {sample['metrics']}")
    detail: dict[str, Any] = {**{key: sample[key] for key in HASHES}, **cost}
    value = sample[settings.metric]
    if settings.unit == "bits_per_byte":
        nats, size = value
        bits = -float(nats) / math.log(2)
        return result(task, item, "", -bits / size, {**detail, "bits": bits, "bytes": int(size)})
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadInput(
            f"item {item.id!r}: {settings.metric} is {value!r}, and a score is a share from 0 to 1"
        )
    prediction, more = _said(settings.metric, item, sample["filtered_resps"])
    return result(task, item, prediction, float(value), {**detail, **more})


def _said(metric: str, item: Item, responses: list[Any]) -> tuple[str, dict[str, Any]]:
    """What the model chose or wrote, and the log-likelihoods behind it."""
    first = responses[0]
    if not isinstance(first, tuple | list) or len(first) != 2 or isinstance(first[0], str):
        return str(first if not isinstance(first, list) else first[0] if first else ""), {}
    values = [float(logprob) for logprob, _ in responses]
    if not item.options:
        return (item.answer if first[1] else ""), {"logprob": float(f"{values[0]:.6g}")}
    given, prior = values[: len(item.options)], values[len(item.options) :]
    by = {
        "acc_norm": [v / len(o) for v, o in zip(given, item.options, strict=True)],
        "acc_bytes": [v / len(o.encode()) for v, o in zip(given, item.options, strict=True)],
        "acc_mutual_info": [v - p for v, p in zip(given, prior, strict=True)] if prior else given,
    }.get(metric, given)
    best = max(range(len(by)), key=lambda k: (by[k], -k))
    return item.options[best], {"logprobs": rounded(item.options, given)}
