"""The six trainers that methods attach to, on tiny models: ``make("dpo", folder, [methods])``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
import trl
from tests.tiny import new_model, tiny_config, tiny_tokenizer
from tests.training.stream import QUIET, rows, tokens

from meristem.training.continual import continual

CLASSES: dict[str, tuple[type, type]] = {
    "plain": (transformers.Trainer, transformers.TrainingArguments),
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}
if hasattr(trl, "DistillationTrainer"):  # since TRL 1.10
    CLASSES["distillation"] = (trl.DistillationTrainer, trl.DistillationConfig)
SEAM = (
    "task",
    "history",
    "method_state",
    "callbacks",
    "peft_config",
    "reference_model",
    "stage",
    "eval_dataset",
)


def data(kind: str, count: int, task: str = "A") -> list[dict[str, Any]]:
    """``count`` rows of a task in the shape that the trainer takes."""
    given = rows(count, task)
    if kind == "plain":
        return tokens(given)
    if kind in ("dpo", "reward"):
        return [{**_but(row, "completion"), "chosen": row["completion"], "rejected": "no"} for row in given]
    if kind in ("grpo", "distillation"):
        return [_but(row, "completion") for row in given]
    return given


def new_reward_model(seed: int = 0) -> Any:
    config = tiny_config()
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForSequenceClassification(config)


def even(completions: list[str], **columns: Any) -> list[float]:
    """A reward that any text has some of."""
    return [sum(ord(letter) % 2 for letter in text) / 10 for text in completions]


def make(
    kind: str, folder: Any, methods: list[Any], given: Any = 4, *, model: Any = None, **options: Any
) -> Any:
    """A trainer of ``kind`` with methods; ``given`` rows or their number, ``options`` as in its own arguments."""
    trainer_class, config_class = CLASSES[kind]
    extra = {key: options.pop(key) for key in SEAM if key in options}
    made = continual(trainer_class, methods, stage=extra.pop("stage", None))
    settings: dict[str, Any] = {**QUIET, "output_dir": str(folder)}
    if kind in ("grpo", "distillation"):
        settings |= {"max_completion_length": 4}
        extra["processing_class"] = tiny_tokenizer()
    if kind == "grpo":
        settings |= {"num_generations": 2, "generation_batch_size": None}
        extra["reward_funcs"] = even
    elif kind == "distillation":
        extra["teacher_model"] = new_model(7)
    elif kind == "plain":
        extra["data_collator"] = transformers.DataCollatorForSeq2Seq(tiny_tokenizer())
    else:
        settings |= {"max_length": 64}
        extra["processing_class"] = tiny_tokenizer()
        if kind == "dpo" and "peft_config" not in extra and not hasattr(model, "peft_config"):
            extra["ref_model"] = new_model(7)
    settings |= options
    known = inspect.signature(config_class).parameters
    return made(
        model=model or (new_reward_model() if kind == "reward" else new_model()),
        args=config_class(**{key: value for key, value in settings.items() if key in known}),
        train_dataset=data(kind, given) if isinstance(given, int) else given,
        **extra,
    )


def _but(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}
