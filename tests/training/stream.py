"""Short ways to a trainer on the tiny model, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import datasets
import torch
import transformers
from tests.tiny import new_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from meristem.training.continual import continual

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

QUIET: dict[str, Any] = {
    "disable_tqdm": True,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "learning_rate": 5e-3,
    "bf16": False,  # TRL's default is True
}


def rows(count: int = 4, task: str = "A") -> list[dict[str, Any]]:
    return [
        {"id": f"{task}-{n}", "task": task, "prompt": f"{task}:{n}=", "completion": str(n * 7 % 10)}
        for n in range(count)
    ]


def tokens(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows for a plain Trainer: all of one length, prompt masked."""
    made = []
    for row in given:
        prompt, answer = [list(row[key].encode()) for key in ("prompt", "completion")]
        made.append(
            {
                "id": row["id"],
                "task": row["task"],
                "input_ids": prompt + answer + [2],
                "labels": [-100] * len(prompt) + answer + [2],
            }
        )
    return made


def plain(
    folder: Any, methods: list[Any], data: Any, *, trainer: type = Trainer, model: Any = None, **options: Any
) -> Any:
    """A plain transformers Trainer with methods on pretokenized rows."""
    extra = {k: options.pop(k) for k in ("task", "history", "method_state", "callbacks") if k in options}
    arguments = TrainingArguments(**{**QUIET, "output_dir": str(folder), **options})
    collate = transformers.DataCollatorForSeq2Seq(tiny_tokenizer())
    made = continual(trainer, methods)
    return made(model or new_model(), args=arguments, train_dataset=data, data_collator=collate, **extra)


def sft(folder: Any, methods: list[Any], data: Any, *, model: Any = None, **options: Any) -> Any:
    """TRL's SFTTrainer with methods on prompt/completion rows."""
    named = ("task", "history", "method_state", "callbacks", "peft_config", "eval_dataset", "reference_model")
    extra = {k: options.pop(k) for k in named if k in options}
    arguments = SFTConfig(**{**QUIET, "output_dir": str(folder), "max_length": 64, **options})
    made = continual(SFTTrainer, methods)
    return made(
        model or new_model(), args=arguments, train_dataset=data, processing_class=tiny_tokenizer(), **extra
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
