"""What every run of a protocol trains and tests on: a plain sample of each task, as data set and suite.

The sample depends on the protocol, its sources and the sizes alone: it is the same for every method, order and seed.
Test items are drawn first; training rows whose input is one of them are left out.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meristem.bench import dialogues
from meristem.bench.protocols import Hub, Protocol, Task
from meristem.bench.sources import Row, read_split
from meristem.data.datasets import ROWS_FILE, load_body, read_dataset
from meristem.data.formats import fold
from meristem.ecosystem import assets
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset
from meristem.errors import BadInput
from meristem.evaluation.contamination import refuse_leaks_into
from meristem.evaluation.service import SUITE_FILE, suite_asset
from meristem.evaluation.suite_files import load_suite
from meristem.store.packs import Blob
from meristem.store.store import Store


@dataclass(frozen=True)
class Sizes:
    """Rows and items per task, and words per text (None: whole texts).

    ``development``: the items are drawn from the training rows, so that settings can be chosen without the test.
    """

    train: int
    test: int
    words: int | None
    development: bool = False


@dataclass(frozen=True)
class Material:
    """One task's training data and test, ready to be stored. ``dropped``: training rows that were test items."""

    task: str
    train: Asset
    train_body: Blob
    suite: Asset
    suite_body: Blob
    dropped: int

    def to_document(self) -> dict[str, Any]:
        """What decides a result; digests are of the rows and items themselves."""
        return {
            "train": self.train.digest,
            "train_rows": self.train.facts["rows"],
            "suite": self.suite.facts["digest"],
            "test_items": self.suite.facts["items"],
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class Stocked:
    """A task's material in the store."""

    train: AssetEntry
    suite: AssetEntry


def prepare(
    protocol: Protocol, sources: dict[str, Path | Hub], sizes: Sizes, folder: Path
) -> dict[str, Material]:
    """Sample every task and write its files under ``folder``. Raises ``BadInput`` when a task has too few rows."""
    folder.mkdir(parents=True, exist_ok=True)
    return {task.name: _prepare(protocol, task, sources[task.name], sizes, folder) for task in protocol.tasks}


def stock(store: Store, actor: str, material: Material) -> Stocked:
    """Put a task's data set and suite into the store; the same again changes nothing."""
    stored = store.put([material.train_body, material.suite_body])
    with store.transaction(actor, f"bench task {material.task}") as tx:
        tx.add_blobs(stored)
        return Stocked(assets.add(tx, material.train), assets.add(tx, material.suite))


def _prepare(protocol: Protocol, task: Task, source: Path | Hub, sizes: Sizes, folder: Path) -> Material:
    rows = {split: read_split(task, source, split, protocol.shape) for split in ("train", "test")}
    options = sorted({row["label"] for row in rows["train"]}) if protocol.shape == "choice" else []
    cut = {
        split: [made for row in found if _usable(made := _cut(row, sizes.words))]
        for split, found in rows.items()
    }
    drawn = "train" if sizes.development else "test"
    test = _sample(cut[drawn], sizes.test, 1, f"task {task.name}: {drawn}")
    seen = {_key(row) for row in test}
    pool = [row for row in cut["train"] if _key(row) not in seen]
    train = _sample(pool, sizes.train, 0, f"task {task.name}: training")
    question = task.question.format(options=", ".join(options))
    train_file, suite_file = folder / f"{task.name}.train.jsonl", folder / f"{task.name}.suite.yaml"
    test_file = folder / f"{task.name}.test.jsonl"
    _write(train_file, [_training_row(row, question) for row in train])
    _write(test_file, [_test_item(row) for row in test])
    _write_suite(suite_file, protocol, task, test_file.name, question, options)
    suite = load_suite(suite_file)
    body, facts = read_dataset(task.name, train_file)
    refuse_leaks_into(f"task {task.name}", load_body(bytes(body.data)), task.name, suite)
    suite_body, suite_facts = suite_asset(task.name, suite)
    return Material(
        task=task.name,
        train=Asset(kind="dataset", name=task.name, files={ROWS_FILE: body.digest}, facts=facts),
        train_body=body,
        suite=Asset(kind="suite", name=task.name, files={SUITE_FILE: suite_body.digest}, facts=suite_facts),
        suite_body=suite_body,
        dropped=len(cut["train"]) - len(pool),
    )


def _sample(rows: list[Any], count: int, seed: int, what: str) -> list[Any]:
    if count > len(rows):
        raise BadInput(f"{what} has {len(rows)} rows, {count} were asked for; ask for fewer")
    return random.Random(seed).sample(rows, count)


def _cut(row: Row, words: int | None) -> dict[str, Any]:
    """``row`` with its dialogue as messages, and with texts of at most ``words`` words; a label is never cut.

    A dialogue keeps its end. The white space of running text stays as it is (code, tables); elsewhere it is folded.
    """
    if "label" in row:
        return {"text": _first(row["text"], words), "label": row["label"]}
    if "text" in row:
        found = re.match(rf"\s*(?:\S+\s*){{0,{words}}}", row["text"]) if words else None
        return {"text": found[0].rstrip() if found else row["text"]}
    messages = dialogues.messages_of(row["prompt"])
    prompt = dialogues.last_words(messages, words) if words else messages
    return {"prompt": prompt, **{key: _first(row[key], words) for key in ("chosen", "rejected")}}


def _first(text: str, words: int | None) -> str:
    return " ".join(text.split()[:words]) if words else text


def _usable(row: dict[str, Any]) -> bool:
    """Whether a pair still differs after it was cut."""
    return "chosen" not in row or row["chosen"] != row["rejected"]


def _key(row: dict[str, Any]) -> str:
    return fold(row["text"] if "text" in row else " ".join(m["content"] for m in row["prompt"]))


def _training_row(row: dict[str, Any], question: str) -> dict[str, Any]:
    if "label" in row:
        return {"prompt": f"{question}\n\n{row['text']}", "completion": row["label"]}
    if "chosen" in row:
        answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
        return {"prompt": row["prompt"], **answers}
    return row


def _test_item(row: dict[str, Any]) -> dict[str, Any]:
    if "label" in row:
        return {"text": row["text"], "answer": row["label"]}
    if "chosen" in row:
        return {"messages": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
    return row


def _write_suite(
    path: Path, protocol: Protocol, task: Task, data: str, question: str, options: list[str]
) -> None:
    about: dict[str, Any] = {"name": task.name, "kind": "target", "data": data}
    if protocol.shape == "choice":
        prompt = question.replace("{", "{{").replace("}", "}}") + "\n\n{text}"
        about |= {"type": "choice", "metric": "accuracy", "prompt": prompt, "options": options}
    else:
        about["type"] = {"text": "perplexity", "preference": "preference"}[protocol.shape]
    path.write_text(yaml.safe_dump({"name": task.name, "tasks": [about]}), encoding="utf-8")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
