"""What the stages ``cpt``, ``cit`` and ``ca`` share: how a recipe, a model and rows become a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from meristem import experts_format
from meristem.config import Recipe
from meristem.engine.load import expert_state
from meristem.errors import BadInput
from meristem.methods.base import Method, MethodState
from meristem.methods.registry import build
from meristem.training import schedules
from meristem.training.adapters import trainable_model
from meristem.training.continual import continual

Row = dict[str, Any]


class Job(TypedDict):
    """What a stage trains, beside its recipe.

    ``folder`` holds the version that is continued (over ``base_folder`` when it is an adapter). ``rows`` are
    normalised rows with ``task`` and ``id``; ``history`` those of earlier tasks of the lineage, of which a stage takes
    the ones in its own shape.
    """

    folder: Path
    base_folder: Path | None
    rows: Sequence[Row]
    history: Mapping[str, Sequence[Row]]
    method_state: Mapping[str, MethodState] | None
    output: Path
    callbacks: list[TrainerCallback]
    progress: NotRequired[Callable[[str, int], Callable[[int], None]] | None]


def stage_trainer(
    stage: str, trainer_cls: type, arguments: Any, shape: Callable[[Row], Row], recipe: Recipe, job: Job
) -> Any:
    """A ``trainer_cls`` with the recipe's methods, on the job's rows in the ``shape`` that it reads."""
    if recipe.max_steps:
        schedules.parts(recipe, recipe.max_steps)  # refuses before a model is loaded
    methods = [build(m.name, m.arguments) for m in recipe.methods]
    fresh = any(method.fresh_adapter for method in methods)
    model, tokenizer = trainable_model(recipe, job["folder"], job["base_folder"], fresh)
    trainer = continual(
        schedules.scheduled(trainer_cls, recipe), methods=methods, stage=stage, lean=recipe.lean
    )(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([shape(row) for row in job["rows"]]),
        processing_class=tokenizer,
        callbacks=job["callbacks"],
        task=task_name(job["rows"]),
        history=_of_this_stage(job["history"], shape),
        method_state=_with_experts(job["method_state"] or {}, methods, job["folder"]),
        progress=job.get("progress"),
    )
    trainer.remove_callback(PrinterCallback)  # our own progress replaces a line of JSON per step
    return trainer


def _of_this_stage(
    history: Mapping[str, Sequence[Row]], shape: Callable[[Row], Row]
) -> dict[str, Sequence[Row]]:
    """Rows of earlier tasks as the stage reads them; what a line learned in another stage has no place in this one."""
    found: dict[str, Sequence[Row]] = {}
    for task, old in history.items():
        rows = []
        for row in old:
            with suppress(BadInput):
                rows.append(shape(row))
        if rows:
            found[task] = rows
    return found


def _with_experts(
    states: Mapping[str, MethodState], methods: Sequence[Method], folder: Path
) -> dict[str, MethodState]:
    """``states``, and what a version of experts says itself in that of the method that goes on with it."""
    found = dict(states)
    if (folder / experts_format.CONFIG).is_file():
        state = expert_state(folder)
        for method in methods:
            if method.content == "experts":
                more = found.get(method.label, {"tensors": {}, "json": {}})
                found[method.label] = {
                    "tensors": {**more["tensors"], **state["tensors"]},
                    "json": {**more["json"], **state["json"]},
                }
    return found


def common_arguments(recipe: Recipe, output: Path) -> dict[str, Any]:
    """What Hugging Face's ``TrainingArguments`` say in every stage."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": schedules.transformers_name(recipe),
        "warmup_steps": recipe.warmup_share,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": recipe.device == "cpu",
        "seed": recipe.seed,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def task_name(rows: Sequence[Row]) -> str:
    """The task of an update; several tasks at once are learned as one, named after all of them."""
    return "+".join(dict.fromkeys(row["task"] for row in rows))


def refuse_long_rows(tokenized: Dataset, lengths: Sequence[int], limit: int) -> None:
    """``BadInput`` for rows of more than ``limit`` tokens: a trainer would cut their answers without a word."""
    long = {name: size for name, size in zip(tokenized["id"], lengths, strict=True) if size > limit}
    if long:
        named = ", ".join(f"{name} ({length} tokens)" for name, length in list(long.items())[:3])
        raise BadInput(
            f"{len(long)} rows are longer than max_length {limit}, which would cut their answers: {named}"
            f"{', ...' if len(long) > 3 else ''}; raise max_length in the recipe to {max(long.values())}, or "
            "shorten them"
        )
