"""The model that every stage trains: a PEFT LoRA, fresh or continued, or all weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import GenerationConfig, set_seed

from meristem.config import Lora, Recipe
from meristem.engine.load import load_for_training
from meristem.errors import BadInput


def trainable_model(
    recipe: Recipe, folder: Path, base_folder: Path | None, fresh: bool = False
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of the version in ``folder``: its adapter if it has one, else a fresh LoRA.

    With ``fresh`` a fresh LoRA on its base in any case. With ``recipe.weights`` ``full``, all weights, as fp32
    whatever ``recipe.dtype`` computes in: a bf16 weight keeps 8 bits, so that most steps at a usual learning rate
    would round to nothing. ``save_full`` rounds once, at the end.
    """
    set_seed(recipe.seed)  # a fresh LoRA is drawn at random
    if recipe.weights == "full":
        if base_folder is not None:
            raise BadInput(f"{folder}: an adapter, and recipe.weights: full trains a version without one")
        model, tokenizer = load_for_training(folder, None, "float32", recipe.device)
        # That of the folder stays with the version; transformers would not save many of them into a checkpoint.
        model.generation_config = GenerationConfig()
        return model, tokenizer
    model, tokenizer = load_for_training(folder, base_folder, recipe.dtype, recipe.device, fresh)
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
