"""Stage ``cit``, continual instruction tuning: TRL's SFTTrainer on a PEFT LoRA, completion-only loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from meristem.config import Lora, Recipe
from meristem.engine.load import load_for_training
from meristem.errors import BadInput
from meristem.methods.base import MethodState
from meristem.methods.registry import build
from meristem.training.continual import continual

Row = dict[str, Any]


def build_trainer(
    recipe: Recipe,
    *,
    folder: Path,
    base_folder: Path | None,
    rows: Sequence[Row],
    history: Mapping[str, Sequence[Row]],
    method_state: Mapping[str, MethodState] | None,
    output: Path,
    callbacks: list[TrainerCallback],
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Any:
    """A trainer that continues the version in ``folder``: its adapter if it has one, else a fresh LoRA.

    ``rows`` are normalised rows with ``task`` and ``id``; ``history`` those of earlier tasks of the lineage.
    ``recipe.lora`` shapes a fresh LoRA only (``training.recipes`` settles it for one that is continued). Raises
    ``BadInput`` for rows, replayed ones included, that are longer than ``recipe.max_length``.
    """
    methods = [build(m.name, m.arguments) for m in recipe.methods]
    set_seed(recipe.seed)  # a fresh LoRA is drawn at random
    model, tokenizer = load_for_training(folder, base_folder, recipe.dtype, recipe.device)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, lora_config(recipe.lora or Lora(), model))
    examples = [as_prompt_completion(row) for row in rows]
    arguments = training_arguments(recipe, output)
    arguments.max_length = None  # TRL would cut the answer off, and drop what is left without one
    trainer = continual(SFTTrainer, methods=methods, stage="cit")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=callbacks,
        task=task_name(rows),
        history={task: [as_prompt_completion(row) for row in old] for task, old in history.items()},
        method_state=dict(method_state or {}),
        progress=progress,
    )
    trainer.args.max_length = recipe.max_length
    _refuse_long_rows(trainer.train_dataset, recipe.max_length)
    trainer.remove_callback(PrinterCallback)  # our own progress replaces a line of JSON per step
    return trainer


def _refuse_long_rows(tokenized: Dataset, limit: int) -> None:
    columns = tokenized["id"], tokenized["input_ids"]
    long = {name: len(tokens) for name, tokens in zip(*columns, strict=True) if len(tokens) > limit}
    if long:
        named = ", ".join(f"{name} ({length} tokens)" for name, length in list(long.items())[:3])
        raise BadInput(
            f"{len(long)} rows are longer than max_length {limit}, which would cut their answers: {named}"
            f"{', ...' if len(long) > 3 else ''}; raise max_length in the recipe to {max(long.values())}, or "
            "shorten them"
        )


def lora_config(lora: Lora, model: Any) -> LoraConfig:
    """PEFT's configuration; ``lora.layers`` < 1 adapts the top layers only, so that backward stops there."""
    layers = model.config.get_text_config().num_hidden_layers
    top = math.ceil(layers * lora.layers)
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


def training_arguments(recipe: Recipe, output: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_share,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        max_length=recipe.max_length,
        completion_only_loss=True,
        packing=False,
        bf16=recipe.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=recipe.device == "cpu",
        seed=recipe.seed,
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def as_prompt_completion(row: Row) -> Row:
    """A row as TRL's conversational prompt/completion, which the chat template and the loss mask need."""
    kept: Row = {key: row[key] for key in ("id", "task") if key in row}
    if "messages" in row:
        *prompt, last = row["messages"]
        return {"prompt": prompt, "completion": [last], **kept}
    if "completion" not in row:
        raise BadInput(
            f"row {row.get('id')}: stage cit needs messages or prompt and completion; other stages are not built yet"
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return {"prompt": prompt, "completion": completion, **kept}


def task_name(rows: Sequence[Row]) -> str:
    """The task of an update; several tasks at once are learned as one, named after all of them."""
    return "+".join(dict.fromkeys(row["task"] for row in rows))
