"""The model that every stage trains: a PEFT LoRA, fresh or continued."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import set_seed

from meristem.config import Lora, Recipe
from meristem.engine.load import load_for_training


def trainable_model(
    recipe: Recipe, folder: Path, base_folder: Path | None, fresh: bool = False
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of the version in ``folder``: its adapter if it has one, else a fresh LoRA.

    With ``fresh`` a fresh LoRA on its base in any case.
    """
    set_seed(recipe.seed)  # a fresh LoRA is drawn at random
    model, tokenizer = load_for_training(folder, base_folder, recipe.dtype, recipe.device, fresh)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, lora_config(recipe.lora or Lora(), model))
    return model, tokenizer


def save_trained(trainer: Any, folder: Path) -> None:
    """Writes what was trained: the adapter, or what a method makes of it (``Method.save``)."""
    if writer := next((method for method in trainer.methods if method.content != "adapter"), None):
        writer.save(folder)
    else:
        trainer.model.save_pretrained(str(folder), selected_adapters=["default"])  # not stage ca's reference


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
