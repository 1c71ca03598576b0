"""One process of ``method_cost``: trains one variant, waiting before every step until it is told to go on.

Its orders are one JSON argument; what it finds goes to its standard output as one JSON document a line.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from benchmarks.moe_cl_reference import ReferenceTrainer, two_branches
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from meristem._quiet import quiet_libraries
from meristem.config import Lora, MethodConfig, Recipe
from meristem.data.formats import read_rows
from meristem.demo.story import DATA, TASKS
from meristem.engine.load import load_for_training
from meristem.errors import MeristemError
from meristem.methods.base import MethodState
from meristem.training import cit
from meristem.training.adapters import trainable_model

QUESTION = "\nWhat is this news about: World, Sports, Business, Science or Technology?"
Row = dict[str, Any]


def main() -> None:
    orders = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(orders["threads"])
    with quiet_libraries():
        try:
            {"first": first, "measured": measured, "growth": growth}[orders["do"]](orders, answers)
        except MeristemError as error:
            tell(answers, {"refused": str(error)})


def tell(answers: TextIO, document: Mapping[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")


class Gate(TrainerCallback):
    """Says what the step before took (batches, logging and callbacks included) and waits for the word to go on."""

    def __init__(self, answers: TextIO, trainer: list[Any]):
        self.answers, self.trainer, self.before = answers, trainer, (0.0, 0.0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        tell(self.answers, {"trains": True})
        self._go()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        seconds = {"wall": now - self.before[0], "cpu": cpu - self.before[1]}
        tell(self.answers, {**seconds, "tokens": self.trainer[0]._total_train_tokens, "peak_kib": peak_kib()})
        self._go()

    def _go(self) -> None:
        sys.stdin.readline()
        self.before = (time.perf_counter(), time.process_time())


def first(orders: dict[str, Any], answers: TextIO) -> None:
    """Learns the first task, so that the second begins with an adapter and a method state like any later update."""
    rows, _ = two_tasks(orders)
    trainer = built({**orders, "steps": 2}, rows, {}, orders["model"], None, None, [])
    trainer.train()
    trainer.model.save_pretrained(orders["folder"], selected_adapters=["default"])
    state = trainer.method_state()
    for name, part in state.items():
        save_file({k: v.contiguous() for k, v in part["tensors"].items()}, f"{orders['folder']}/{name}.state")
        Path(orders["folder"], f"{name}.json").write_text(json.dumps(part["json"]))
    tell(answers, {"state_bytes": sum(map(state_bytes, state.values()))})


def measured(orders: dict[str, Any], answers: TextIO) -> None:
    """Learns the second task step by step."""
    old, rows = two_tasks(orders)
    folder, names = orders["folder"], [orders["method"]["name"]] if orders["method"] else []
    state = {name: method_state(name, folder) for name in names}
    holder: list[Any] = []
    gate = Gate(answers, holder)
    started = time.process_time()
    history = {old[0]["task"]: old}
    holder.append(built(orders, rows, history, folder, orders["model"], state, [gate]))
    prepared = time.process_time() - started
    holder[0].train()
    spent = time.process_time() - gate.before[1]  # since the last step: finish
    losses = [entry["loss"] for entry in holder[0].state.log_history if "loss" in entry]
    tell(
        answers,
        {"prepare_cpu": prepared, "finish_cpu": spent, "peak_kib": peak_kib(), "losses": losses},
    )


def method_state(name: str, folder: str) -> MethodState:
    """What ``first`` left of one method."""
    document = json.loads(Path(folder, f"{name}.json").read_text())
    return {"tensors": load_file(f"{folder}/{name}.state"), "json": document}


def built(
    orders: dict[str, Any],
    rows: list[Row],
    history: Mapping[str, Sequence[Row]],
    folder: str,
    base: str | None,
    state: Any,
    callbacks: list[Any],
) -> Any:
    recipe = Recipe(
        max_steps=orders["steps"],
        batch_size=orders["batch"],
        methods=[MethodConfig(**orders["method"])] if orders["method"] else [],
        lora=Lora(**orders["lora"]),
        dtype=orders["dtype"],
        lean=orders["lean"],
    )
    output, paths = Path(tempfile.mkdtemp()), (Path(folder), Path(base) if base else None)
    if orders["seam"]:
        return cit.build_trainer(
            recipe,
            folder=paths[0],
            base_folder=paths[1],
            rows=rows,
            history=history,
            method_state=state,
            output=output,
            callbacks=callbacks,
        )
    if branches := orders.get("two_branches"):
        model, tokenizer = load_for_training(Path(orders["model"]), None, orders["dtype"])
        game = two_branches(model, method_state(branches, folder))
        trainer_cls: Any = type("Trainer", (ReferenceTrainer,), {"game": game})
    else:
        (model, tokenizer), trainer_cls = trainable_model(recipe, *paths), SFTTrainer
    arguments = cit.training_arguments(recipe, output)
    if orders["checkpointing"]:  # transformers reads the second, TRL the first
        arguments.gradient_checkpointing = arguments.activation_checkpointing = True
    trainer = trainer_cls(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([cit.as_prompt_completion(row) for row in rows]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def two_tasks(orders: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """Rows of an old and of a new task, of one kind and length: two parts of AG News, or the demo's ticket routing."""
    count = orders["batch"] * orders["steps"]
    if orders["data"]:
        with gzip.open(Path(orders["data"], "train.jsonl.gz"), "rt") as file:
            found = [json.loads(line) for _, line in zip(range(2 * count), file, strict=False)]
        rows = [{"prompt": row["text"] + QUESTION, "completion": row["label"]} for row in found]
    else:
        given = list(read_rows(DATA / f"{TASKS[0]}.train.jsonl"))
        rows = [dict(given[at % len(given)]) for at in range(2 * count)]
    named = [{**row, "id": f"r{at}", "task": "old" if at < count else "new"} for at, row in enumerate(rows)]
    return named[:count], named[count:]


def growth(orders: dict[str, Any], answers: TextIO) -> None:
    """Bytes of adapter and of method state after each of 20 tasks on the tests' tiny model: 100 rows, one step each."""
    from tests.tiny import tiny_model

    base = tiny_model(tempfile.mkdtemp())
    orders |= {"steps": 1, "batch": 4, "dtype": "float32", "seam": True, "lean": True, "lora": {"rank": 4}}
    folder, state, history = str(base), None, {}
    for task in range(20):
        rows = [
            {
                "id": f"{task}-{n}",
                "task": f"t{task}",
                "prompt": f"{task} {n:02} asks",
                "completion": str(n % 10),
            }
            for n in range(100)
        ]
        trainer = built(orders, rows, history, folder, str(base) if state is not None else None, state, [])
        trainer.train()
        state, folder = trainer.method_state(), tempfile.mkdtemp()
        trainer.model.save_pretrained(folder, selected_adapters=["default"])
        history[f"t{task}"] = rows
        weights = load_file(f"{folder}/adapter_model.safetensors")
        tell(
            answers,
            {
                "adapter": sum(v.nbytes for v in weights.values()),
                "state": sum(map(state_bytes, state.values())),
            },
        )


def state_bytes(state: Any) -> int:
    """Of tensors and of JSON."""
    return sum(v.nbytes for v in state["tensors"].values()) + len(json.dumps(state["json"]).encode())


def peak_kib() -> int:
    """Highest resident memory of this process so far."""
    with Path("/proc/self/status").open() as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
