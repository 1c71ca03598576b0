"""Hugging Face's two homes for scores, written by ``huggingface_hub`` itself.

``.eval_results/*.yaml`` in a model's repository feeds the leaderboard of a data set that the Hub knows as a
benchmark. ``model-index`` in a model card's head takes any data set, a company's own too.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import yaml

from meristem.errors import BadInput, EnvironmentFailure
from meristem.evaluation.exports.document import Measured
from meristem.evaluation.exports.scales import scale


def eval_results_yaml(found: Measured, dataset: str | None = None) -> str:
    """One entry per task. ``dataset``: the benchmark's id on the Hub; ``task_id`` is the task's name.

    Without one the id is ``suite:NAME``, which no repository of the Hub can have: the file is then good for
    tools of your own, and the Hub refuses it instead of counting the score for somebody else's data set.
    """
    hub = _hub()
    made = [
        hub.EvalResultEntry(
            dataset_id=_dataset(found, dataset),
            task_id=task,
            value=_value(found, score),
            date=found.event.time if found.event else None,
            notes=_notes(found),
        )
        for task, score in found.entry.record.summary["tasks"].items()
    ]
    return str(yaml.safe_dump(hub.eval_result_entries_to_yaml(made), sort_keys=False, allow_unicode=True))


def model_card(found: Measured, dataset: str | None = None) -> str:
    """The head of a model card (``README.md``) with one ``model-index`` result per task."""
    hub = _hub()
    kinds: dict[str, Any] = {task.name: task for task in found.suite.tasks}
    results = [
        hub.EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_type=_dataset(found, dataset),
            dataset_name=found.asset.label,
            dataset_revision=found.entry.record.suite,
            metric_type=str(kinds[task].metric),
            metric_value=_value(found, score),
            metric_args={"engine": found.entry.record.engine, "evaluation": found.entry.digest},
        )
        for task, score in found.entry.record.summary["tasks"].items()
    ]
    data = hub.ModelCardData(model_name=found.version.label, eval_results=results)
    return f"---\n{data.to_yaml()}\n---\n"


def _value(found: Measured, score: float) -> float:
    """In the direction that people read the quantity: bits per byte are positive."""
    return scale(found.entry.record.summary.get("unit")).sign * score


def _dataset(found: Measured, dataset: str | None) -> str:
    if dataset is None:
        return f"suite:{found.asset.name}"
    if dataset.count("/") != 1 or not all(dataset.split("/")):
        raise BadInput(f"--dataset {dataset!r}: give the Hub's id of the data set, ORG/NAME")
    return dataset


def _notes(found: Measured) -> str:
    record = found.entry.record
    return (
        f"{found.version.label} content {found.version.content}; suite {found.asset.label} {record.suite}; "
        f"engine {record.engine}; evaluation {found.entry.digest}"
    )


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise EnvironmentFailure(
            "Hugging Face's formats need huggingface_hub; install it with `pip install meristem[train]`"
        ) from error
    return huggingface_hub
