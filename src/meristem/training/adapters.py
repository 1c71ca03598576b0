"""The model that a stage trains, and the part of a trainer's arguments that every stage shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import set_seed

from meristem.config import Lora, Recipe
from meristem.engine.load import load_for_training
from meristem.errors import BadInput

Row = Mapping[str, Any]


def trainable_model(recipe: Recipe, folder: Path, base_folder: Path | None) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of the version in ``folder``: its adapter if it has one, else a fresh LoRA."""
    set_seed(recipe.seed)  # a fresh LoRA is drawn at random
    model, tokenizer = load_for_training(folder, base_folder, recipe.dtype, recipe.device)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, lora_config(recipe.lora or Lora(), model))
    return model, tokenizer


def lora_config(lora: Lora, model: Any) -> LoraConfig:
    """PEFT's configuration; ``lora.layers`` < 1 adapts the top layers only, so that backward stops there."""
    layers = model.config.get_text_config().num_hidden_layers
    top = math.ceil(layers * lora.layers)
    targets: Any
    which: list[int] | None
    if top == layers:
        targets, which = lora.targets, None
    else:  # PEFT takes no layer list beside its "all-linear"
        targets = linear_names(model) if lora.targets == "all-linear" else lora.targets
        which = list(range(layers - top, layers))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=which,
        task_type="CAUSAL_LM",
    )


def linear_names(model: Any) -> list[str]:
    """Last name parts of the linear layers inside the transformer blocks, e.g. ``q_proj``."""
    backbone = model.get_decoder()
    return sorted({n.rpartition(".")[2] for n, m in backbone.named_modules() if isinstance(m, Linear)})


def common_arguments(recipe: Recipe, output: Path) -> dict[str, Any]:
    """What Hugging Face's ``TrainingArguments`` say in every stage."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
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
