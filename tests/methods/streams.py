"""Two short streams for the tests of methods: one for claims, one that continues an adapter."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tests.tiny import new_model, three_tasks
from tests.training.stream import plain, rows, sft, tokens, weights
from transformers import TrainerCallback

from meristem.training import _checkpoint

SEEDS = (0, 1, 2)
STEPS, RATE = 25, 8e-3


# ---- claims ----------------------------------------------------------------------------------------------------


def assert_forgets_less(make: Any, folder: Any, first: bool = True, rate: float = RATE) -> None:
    """Less forgetting and a lower final loss than sequential fine-tuning, each by more than its spread.

    ``make()`` gives the methods of an update; with ``first=False`` they are attached from task B on; ``rate`` is
    their learning rate (sequential fine-tuning keeps RATE: at a higher one it forgets more). Forgetting
    is the mean over A, B of (loss at the end - loss right after the task), the final loss the mean over all.
    """
    found = [_learn(make, seed, str(folder), first, rate) for seed in SEEDS]
    usual = [_sequential(seed, str(folder)) for seed in SEEDS]
    print(found, usual)  # shown when a line below fails
    for column in (0, 1):
        gains = [theirs[column] - ours[column] for theirs, ours in zip(usual, found, strict=True)]
        assert mean(gains) > stdev(gains), gains


@cache
def _sequential(seed: int, folder: str) -> tuple[float, float]:
    return _learn(list, seed, folder, first=False)


@cache
def _task_a(seed: int, folder: str, rate: float) -> tuple[dict[str, torch.Tensor], float]:
    """The weights after task A without a method, and its loss on A."""
    trainer, data = _update([], "A", new_model(seed), None, seed, folder, rate), three_tasks()["A"]
    return weights(trainer.model), loss(trainer, data)


def _learn(make: Any, seed: int, folder: str, first: bool, rate: float = RATE) -> tuple[float, float]:
    tasks, state, learned = three_tasks(), None, {}
    if first:
        model, rest = new_model(seed), "ABC"
    else:
        after_a, learned["A"] = _task_a(seed, folder, rate)
        model, rest = new_model(seed), "BC"  # no deep copy: TRL binds its forward to the model it was given
        model.load_state_dict(after_a)
    for task in rest:
        trainer = _update(make(), task, model, state, seed, folder, rate)
        state = trainer.method_state()
        learned[task] = loss(trainer, tasks[task])
    final = {task: loss(trainer, data) for task, data in tasks.items()}
    return mean(final[task] - learned[task] for task in "AB"), mean(final.values())


def _update(
    methods: list[Any], task: str, model: Any, state: Any, seed: int, folder: str, rate: float = RATE
) -> Any:
    options = {"max_steps": STEPS, "per_device_train_batch_size": 6, "seed": seed, "method_state": state}
    options |= {"learning_rate": rate}
    trainer = plain(folder, methods, tokens(three_tasks()[task]), task=task, model=model, **options)
    trainer.train()
    return trainer


def loss(trainer: Any, data: list[dict[str, Any]]) -> float:
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.context.loss(next(trainer.context.batches(tokens(data), batch_size=len(data)))))


# ---- a continued adapter ---------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Ends the process at step 5, with nothing put away."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os._exit(9)


def trained_adapter(folder: Path, methods: list[Any]) -> tuple[Any, dict[str, Any]]:
    """A first update on task A: its model and method state, as they are in memory; both are saved too."""
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = sft(folder / "first", methods, rows(6, "A"), peft_config=lora, task="A", **BRIEF)
    trainer.train()
    trainer.model.save_pretrained(str(folder / "adapter"))
    state = trainer.method_state()
    _checkpoint.write(folder / "state", state, 0)
    return trainer.model, state


def saved(folder: Path) -> Any:
    """The adapter in ``folder`` as PEFT alone loads it, ready to be trained on."""
    return PeftModel.from_pretrained(new_model(), str(folder), is_trainable=True)


def second(folder: Path, output: str, methods: list[Any], **options: Any) -> Any:
    """The second update, on task B; it starts from what ``trained_adapter`` saved, or from ``options``."""
    options = {**BRIEF, "save_strategy": "steps", "save_steps": 2, **options}
    if "model" not in options:
        options |= {"model": saved(folder / "adapter"), "method_state": _checkpoint.read(folder / "state")}
    return sft(folder / output, methods, rows(6, "B"), task="B", **options)


BRIEF: dict[str, Any] = {
    "max_steps": 7,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
