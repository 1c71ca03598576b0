"""A stream of two tasks for the tiny model, its data folder, and result files made by hand."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

from tests import acme

from meristem.bench.protocols import Protocol, Task
from meristem.evaluation.metrics import TaskMatrix
from meristem.store.canonical import digest_document

ANSWERS = {"red": "7", "blue": "5"}
TASKS = tuple(Task(name, name, "Answer with a digit: {options}.") for name in ANSWERS)
ORDERS = {"1": ("red", "blue"), "2": ("blue", "red")}
RECIPE = {
    "max_steps": 4,
    "batch_size": 8,
    "learning_rate": 0.01,
    "max_length": 96,
    "dtype": "float32",
    "schedule": "constant",
    "warmup_share": 0.0,
    "checkpoint_steps": 4,
}
TINY = Protocol("tiny-2", "two digits", "choice", TASKS, ORDERS, RECIPE)
TEXT = Protocol("tiny-text", "one text", "text", TASKS[:1], {"1": ("red",)}, {**RECIPE, "stage": "cpt"})
PAIRS = Protocol("tiny-pairs", "one", "preference", TASKS[:1], {"1": ("red",)}, {**RECIPE, "stage": "ca"})


def data_folder(folder: Path) -> Path:
    """``red`` and ``blue``, as choice, text and preference at once: every row has all the keys."""
    for name, answer in ANSWERS.items():
        (folder / name).mkdir(parents=True)
        for split, words in (("train", acme.WORDS), ("test", [f"{word}s" for word in acme.WORDS])):
            rows = [_row(name, word, answer if word[0] < "p" else "1") for word in words]
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _row(name: str, word: str, answer: str) -> dict[str, str]:
    return {
        "text": f"{name} {word} ?",
        "label": answer,
        "prompt": f"Human: {name}\n\nAssistant: yes\n\nHuman: {word}?\n\nAssistant:",
        "chosen": answer,
        "rejected": "9",
    }


def result(
    method: str,
    scores: list[list[float | None]],
    *,
    seed: int = 0,
    order: str = "1",
    protocol: str = "tiny-2",
    single: list[float] | None = None,
    tasks: tuple[str, ...] = ("red", "blue"),
    **other: Any,
) -> dict[str, Any]:
    """A result document as ``bench run`` writes it; the untrained model scores 0.2 everywhere."""
    settings = {
        "schema": "meristem/bench-run/v1",
        "protocol": protocol,
        "order": order,
        "tasks": list(tasks),
        "words": None,
        "method": method,
        "seed": seed,
        "recipe": {
            "stage": "cit",
            "max_steps": 8,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 0.01,
            "lora": None,
            "dtype": "float32",
            "device": "cpu",
            "seed": seed,
            "methods": [],
        },
        "model": {"source": "tiny", "content": "sha256:" + "0" * 64},
        "data": {task: {"train_rows": 10, "test_items": 10} for task in sorted(tasks)},
        "engine": {"dtype": "float32", "libraries": {}},
        "code": {"python": "3"},
        **copy.deepcopy(other),
    }
    document = TaskMatrix(scores, [0.2] * len(tasks), single).to_document()
    if single is not None:
        document["acc"] = sum(single) / len(single)
    update = {"tasks": [], "steps": 8, "tokens": 80, "seconds": 1.5}
    return {
        "schema": "meristem/bench-result/v1",
        "name": f"{protocol}-{order}-{method.replace(':', '_')}-seed{seed}",
        "digest": digest_document(settings),
        **{key: settings[key] for key in ("protocol", "order", "method", "seed", "tasks")},
        **document,
        "updates": [update, update],
        "train_seconds": 3.0,
        "seconds": 4.0,
        "settings": settings,
    }


def write(folder: Path, *documents: dict[str, Any]) -> Path:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for document in documents:
        (folder / "results" / f"{document['name']}.json").write_text(json.dumps(document))
    return folder
