"""One of two gloo processes: DDP as ``accelerate launch`` starts it, then FSDP2 by bare ``fully_shard``.

Writes what it found to ``FOLDER/rank-R.pt``; test_distributed.py starts it and holds it against one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model, tiny_tokenizer
from tests.training.stream import weights
from tests.training.trainers import data, make, new_reward_model

from meristem import ForgettingCallback
from meristem.engine.borrow import borrowed
from meristem.errors import BadInput, Clash
from meristem.evaluation import live
from meristem.evaluation.items import Item, Message
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.choice import Choice
from meristem.methods import EWC, ExperienceReplay, Method, available, build

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


class RowTerm(Method):
    """A term whose mean over all rows is the mean over ranks and micro-batches; notes the ids that it saw."""

    name, columns = "row-term", frozenset({"id", "task"})

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[str]]] = []

    def loss(self, step: Any) -> Any:
        self.seen.append((step.ids, step.tasks))
        weight = torch.tensor([float(name[-1]) for name in step.ids]).mean()
        return weight * 0.01 * sum(p.square().sum() for p in step.model.parameters() if p.requires_grad)


class HiddenTerm(RowTerm):
    """The mean square of the hidden states."""

    def loss(self, step: Any) -> Any:
        self.seen.append((step.ids, step.tasks))
        return 0.1 * step.hidden.square().mean()


class Again(Method):
    """Half of the likelihood of the batch by a second forward through the wrapped model."""

    name, needs = "again", frozenset({"likelihood"})

    def loss(self, step: Any) -> Any:
        return 0.5 * step.loss_of(step.inputs)


class Around(Method):
    """Lets every micro-batch run as it is: nothing must change."""

    name = "around"

    def around(self, run: Any) -> Any:
        return run()


def ddp(folder: Path, kind: str, processes: int, **options: Any) -> Any:
    """A trainer on ``processes`` processes: a global batch of eight rows in two micro-batches."""
    methods: list[Method] = [RowTerm()]
    if kind in ("plain", "sft"):
        methods = [ExperienceReplay(ratio=0.5), EWC(strength=50.0, samples=4), RowTerm(), Again(), Around()]
    elif kind in ("dpo", "reward"):
        methods = [ExperienceReplay(ratio=0.5), RowTerm()]
    options = {"max_steps": 3, "task": "B", "history": {"A": data(kind, 4)}, **SGD, **LOGGED, **options}
    options |= {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    return make(kind, folder / kind, methods, data(kind, 12, "B"), model=model_for(kind), **options)


def model_for(kind: str) -> Any:
    """LoRA for DPO, whose reference is then the model without it."""
    if kind != "dpo":
        return new_reward_model() if kind == "reward" else new_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(new_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def found(trainer: Any) -> dict[str, Any]:
    logged = [
        {k: v for k, v in entry.items() if k in ("loss", "grad_norm") or "/" in k}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    term = next(m for m in trainer.methods if m.label == "row-term")
    return {
        "weights": weights(trainer.model),
        "logged": logged,
        "seen": term.seen,
        "state": trainer.method_state(),
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


DDP_KINDS = ("sft", "plain", "dpo", "reward", "distillation", "grpo")


def all_ddp(folder: Path, processes: int) -> dict[str, Any]:
    results = {}
    for kind in DDP_KINDS:
        saving = {"save_strategy": "steps", "save_steps": 2} if kind == "sft" else {}
        trainer = ddp(folder, kind, processes, **saving)
        trainer.train()
        results[kind] = found(trainer)
    resumed = ddp(folder, "sft", processes, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "sft" / "checkpoint-2"))
    results["resumed"] = found(resumed)
    return results


def probe() -> Suite:
    """What the new model answers to 24 questions is taken for right."""

    def asked(answers: list[str]) -> Suite:
        items = (
            Item(f"i{n}", (Message("user", f"A:{n}="),), answer, tuple("0123456789"))
            for n, answer in enumerate(answers)
        )
        return Suite("probe", (Task("t", "choice", Choice(), "target", tuple(items)),))

    with borrowed(new_model(), tiny_tokenizer()) as engine:
        return asked([row["prediction"] for row in evaluate(engine, asked(["0"] * 24))])


def watched(folder: Path, processes: int, rate: float = 0.01) -> dict[str, Any]:
    """A run that forgets, stopped by its watch; no look waits for another rank."""
    watch = ForgettingCallback(probe(), patience=2, every=1)
    options = {"max_steps": 12, "optim": "adamw_torch", "learning_rate": rate, "callbacks": [watch], **LOGGED}
    options |= {"per_device_train_batch_size": 8 // processes}
    trainer = make("sft", folder / "watched", [], data("sft", 12, "B"), **options)
    trainer.train()
    scores = [line for line in trainer.state.log_history if "forgetting/score" in line]
    return {"scores": scores, "step": trainer.state.global_step, "flips": watch.flips, "reason": watch.reason}


def apart(folder: Path, rank: int) -> dict[str, Any]:
    """The same with nothing learnt, while rank 1 takes every answer for wrong."""
    measure = live.evaluate

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return [{**row, "score": 0.0} for row in measure(*args, **kwargs)]

    live.evaluate = wrong if rank else measure
    try:
        return watched(folder, 2, rate=0.0)
    finally:
        live.evaluate = measure


def fsdp(folder: Path, mesh: Any = None) -> dict[str, Any]:
    """SFT with replay and EWC over two updates; the same rows on every rank, so one process gives the same."""
    state: Any = None
    results: dict[str, Any] = {}
    for task in "BC":
        model = shard(new_model(), mesh)
        methods: list[Method] = [
            ExperienceReplay(ratio=0.5),
            EWC(strength=50.0, samples=4),
            HiddenTerm(),
            Again(),
        ]
        options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        options |= {"task": task, "history": {"A": data("sft", 4)}, "method_state": state, **SGD, **LOGGED}
        trainer = make("sft", folder / "fsdp", methods, data("sft", 8, task), model=model, **options)
        trainer.train()
        state = trainer.method_state()
        kinds = {type(p).__name__ for p in trainer.parameters().values()}
        results[task] = {**found(trainer), "kinds": kinds}
        results[task]["weights"] = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in results[task]["weights"].items()
        }
    return results


def shard(model: Any, mesh: Any) -> Any:
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def refusals(folder: Path, mesh: Any) -> dict[str, str]:
    """What every registered method says to sharded weights when the trainer is made; a term of weights at a step."""
    said: dict[str, str] = {}
    for name in available():
        try:
            make("sft", folder, [build(name)], data("sft", 2), model=shard(new_model(), mesh))
        except Clash as clash:
            said[name] = str(clash)
    saving = {"save_strategy": "steps", "save_steps": 1}
    for name, options, resume in (
        ("row-term", {}, None),
        ("save", saving, None),
        ("resume", {}, str(folder)),
    ):
        model = shard(new_model(), mesh)
        try:
            made = make("sft", folder, [RowTerm()], data("sft", 2), model=model, max_steps=1, **options)
            made.train(resume_from_checkpoint=resume)
        except Clash as clash:
            said[name] = str(clash)
    return said


def unwatched(folder: Path, mesh: Any) -> str:
    """What a watch says to sharded weights."""
    watch = ForgettingCallback(probe())
    try:
        make("sft", folder, [], 4, model=shard(new_model(), mesh), max_steps=8, callbacks=[watch]).train()
    except BadInput as refused:
        return str(refused)
    return ""


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results = {"ddp": all_ddp(folder, 2), "watched": watched(folder, 2), "apart": apart(folder, rank)}
    # accelerate turns FSDP2 on a CPU into DDP: hide the launch from it and keep the process group
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.distributed.device_mesh import init_device_mesh

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results["fsdp"] = fsdp(folder / f"fsdp-{rank}", mesh)
    results["refused"] = refusals(folder / f"fsdp-{rank}", mesh)
    results["unwatched"] = unwatched(folder / f"fsdp-{rank}", mesh)
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
