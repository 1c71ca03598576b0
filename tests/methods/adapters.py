"""Streams on a LoRA, shared by the tests of methods that work on one: for a claim, and a continued adapter."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import new_model, three_tasks, tiny_config, tiny_tokenizer
from tests.training.stream import rows, sft, weights
from transformers import LlamaForCausalLM, TrainerCallback

from meristem.methods.base import trainable
from meristem.training import _checkpoint

SEEDS = (0, 1, 2)
PRE, STEPS = 200, 30  # optimizer steps before the stream and in each task


# ---- a claim: tasks A, B, C one after the other ----------------------------------------------------------------


@cache
def base(seed: int) -> Any:
    """A small Llama that has learned tasks D to K, which map the keys of A, B and C to other digits.

    On random weights a LoRA learns next to nothing.
    """
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    texts = [f"{task}:{key}={draw.choice('0123456789')}" for task in "DEFGHIJK" for key in "abcdef"]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    labels = torch.where(torch.arange(ids.shape[1]) < 4, -100, ids)
    config = tiny_config()
    config.hidden_size, config.intermediate_size = 32, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(PRE):
            some = torch.randperm(len(ids))[:24]
            model(input_ids=ids[some], labels=labels[some]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_forgets_less(make: Any, folder: Any, rank: int, first: bool = False, named: bool = False) -> None:
    """Less forgetting and a lower final loss than sequential fine-tuning, each by more than its spread.

    ``make()`` gives the methods, attached from task B on (with ``first`` from task A on), on a LoRA of ``rank``.
    ``named``: prompts tell their task by letters that the base has seen. Forgetting is the mean over A, B of (loss at the
    end - loss right after the task), the final loss the mean over all three tasks.
    """
    usual = [_sequential(seed, str(folder.parent), rank, named) for seed in SEEDS]
    found = [learn(make, seed, str(folder), rank, first, named) for seed in SEEDS]
    print(found, usual)  # shown when a line below fails
    for column in (0, 1):
        gains = [theirs[column] - ours[column] for theirs, ours in zip(usual, found, strict=True)]
        assert mean(gains) > stdev(gains), gains


@cache
def _sequential(seed: int, folder: str, rank: int, named: bool) -> tuple[float, float]:
    return learn(list, seed, folder, rank, named=named)


def learn(
    make: Any, seed: int, folder: str, rank: int, first: bool = False, named: bool = False
) -> tuple[float, float]:
    tasks, state = _tasks(named), None
    model, learned = _start(seed, rank), {}
    if first:
        trainer = _update(make(), "A", model, seed, folder, tasks)
        model, state, learned["A"] = trainer.model, trainer.method_state(), _loss(trainer, tasks["A"])
    else:
        weights, learned["A"] = _task_a(seed, folder, rank, named)
        model.load_state_dict(weights)
    for task, earlier in (("B", "A"), ("C", "AB")):
        history = {name: tasks[name] for name in earlier}
        trainer = _update(make(), task, model, seed, folder, tasks, method_state=state, history=history)
        model, state, learned[task] = trainer.model, trainer.method_state(), _loss(trainer, tasks[task])
    final = {task: _loss(trainer, data) for task, data in tasks.items()}
    return mean(final[task] - learned[task] for task in "AB"), mean(final.values())


def _tasks(named: bool) -> dict[str, list[dict[str, Any]]]:
    words = {"A": "DE", "B": "FG", "C": "HI"} if named else {}  # letters that the base knows
    return {
        task: [{**row, "prompt": words.get(task, task) + row["prompt"][1:]} for row in data]
        for task, data in three_tasks().items()
    }


def _start(seed: int, rank: int) -> Any:
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base(seed)), lora)


@cache
def _task_a(seed: int, folder: str, rank: int, named: bool) -> tuple[Any, float]:
    """The weights after task A, which every method learns as plain fine-tuning does, and their loss on A."""
    tasks = _tasks(named)
    trainer = _update([], "A", _start(seed, rank), seed, folder, tasks)
    return copy.deepcopy(trainer.model.state_dict()), _loss(trainer, tasks["A"])


def _update(methods: Any, task: str, model: Any, seed: int, folder: str, tasks: Any, **options: Any) -> Any:
    options |= {"max_steps": STEPS, "per_device_train_batch_size": 6, "learning_rate": 5e-3, "seed": seed}
    trainer = sft(folder, methods, tasks[task], task=task, model=model, **options)
    trainer.train()
    return trainer


def _loss(trainer: Any, data: list[dict[str, Any]]) -> float:
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.context.loss(next(trainer.context.batches(data, batch_size=len(data)))))


# ---- a continued adapter: task A, saved, then task B -----------------------------------------------------------

BRIEF: dict[str, Any] = {
    "max_steps": 7,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


ATTENTION = ("q_proj", "v_proj")


def adapter(folder: Path | None = None, dropout: float = 0.0, targets: Sequence[str] = ATTENTION) -> Any:
    """The tiny model with a fresh LoRA, or with the one saved in ``folder``, ready to train."""
    if folder is not None:
        return PeftModel.from_pretrained(new_model(), str(folder), is_trainable=True)
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=[*targets], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(new_model(), lora)


def first(folder: Path, methods: list[Any], targets: Sequence[str] = ATTENTION) -> tuple[Any, dict[str, Any]]:
    """A first update on task A: its adapter and method state, kept in memory and saved under ``folder``."""
    trainer = sft(
        folder / "first", methods, rows(6, "A"), model=adapter(None, 0.2, targets), task="A", **BRIEF
    )
    trainer.train()
    trainer.model.save_pretrained(str(folder / "adapter"))
    _checkpoint.write(folder / "state", trainer.method_state(), 0)
    return trainer.model, trainer.method_state()


def second(folder: Path, output: Path, methods: list[Any], **options: Any) -> Any:
    """The second update, on task B, from what was saved (or from a model and a state kept in memory)."""
    saved = (
        {}
        if "model" in options
        else {"model": adapter(folder / "adapter"), "method_state": _checkpoint.read(folder / "state")}
    )
    return sft(output, methods, rows(6, "B"), task="B", **saved, **BRIEF, **options)


def assert_resumes(make: Any, folder: Path, targets: Sequence[str] = ATTENTION) -> Any:
    """An update from saved state, interrupted and resumed, ends in the bits of one that went on in memory.

    Returns the method state after it. The adapter it leaves is read by PEFT alone.
    """
    model, kept = first(folder, make(), targets)
    whole = second(folder, folder / "whole", make(), model=model, method_state=kept)
    start = weights(whole.model)
    whole.train()
    assert any(not torch.equal(start[name], value) for name, value in weights(whole.model).items())
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        second(folder, folder / "cut", make(), callbacks=[Stop()], **saving).train()
    resumed = second(folder, folder / "cut", make(), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == BRIEF["max_steps"]
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    ours, theirs = resumed.method_state(), whole.method_state()
    for name in theirs:
        torch.testing.assert_close(ours[name]["tensors"], theirs[name]["tensors"], rtol=0, atol=0)
        assert ours[name]["json"] == theirs[name]["json"]
    whole.model.save_pretrained(str(folder / "end"))
    torch.testing.assert_close(trainable(adapter(folder / "end")), _lora(whole.model), rtol=0, atol=0)
    return theirs


def _lora(model: Any) -> dict[str, Any]:
    return {name: p for name, p in trainable(model).items() if "lora_" in name}
