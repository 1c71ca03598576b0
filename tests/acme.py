"""A tiny company: a model of 9,000 parameters, three tasks that overwrite each other, and a workspace for them.

Task ``a`` answers 7 to every question, ``b`` 5, ``c`` 9; the first letter of the question says which task it is.
Learning ``b`` plainly makes the model answer 5 to everything (the gates see it); with replay it keeps both.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from tests.tiny import tiny_config, tiny_tokenizer

WORDS = [
    "ash",
    "bay",
    "cod",
    "dam",
    "elk",
    "fig",
    "gum",
    "hen",
    "ivy",
    "jay",
    "kit",
    "log",
    "mud",
    "net",
    "oak",
    "pea",
    "rye",
    "sap",
    "tea",
    "urn",
]
ANSWERS = {"a": "7", "b": "5", "c": "9"}
REPLAY_AND_EWC = ["experience-replay:ratio=0.5", "ewc:strength=1,samples=8"]
CONFIG = """\
schema: meristem/workspace/v1
evaluation: {dtype: float32, device: cpu, batch_tokens: 8192}
defaults:
  gates:
    - {gate: improvement, suites: new}
    - {gate: non_inferiority, suites: learned, margin: 0.2}
    - {gate: negative_flips, suites: learned, max_rate: 0.3}
  attempts: 2
  retry_methods: ["experience-replay:ratio=0.5", "ewc:strength=1,samples=8"]
  recipe: {max_steps: 30, batch_size: 8, learning_rate: 0.01, max_length: 64, dtype: float32,
           checkpoint_steps: 10, schedule: constant, warmup_share: 0.0}
"""


def model_folder(folder: Path, scale: float = 0.3) -> Path:
    """A random Llama with weights wide enough to tell questions apart."""
    import torch
    from transformers import LlamaForCausalLM

    config = tiny_config()
    config.initializer_range = scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def training_rows(task: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{task}-{word}", "prompt": f"{task.upper()} {word} ?", "completion": ANSWERS[task]}
        for word in WORDS[:16]
    ]


def test_items(task: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{task}-{word}{end}", "prompt": f"{task.upper()} {word}{end} ?", "answer": ANSWERS[task]}
        for word in WORDS
        for end in "sy"
    ]


def suite_file(path: Path, *tasks: str, kind: str = "target", options: str = "['1','3','5','7','9']") -> Path:
    """A suite of choice tasks, its item files beside it."""
    text = f"name: {path.stem}\ntasks:\n"
    for task in tasks:
        lines(path.with_name(f"{path.stem}-{task}-items.jsonl"), test_items(task))
        text += (
            f"  - {{name: {task}, type: choice, data: {path.stem}-{task}-items.jsonl, metric: accuracy, "
            f"kind: {kind}, options: {options}}}\n"
        )
    path.write_text(text, encoding="utf-8")
    return path


def company(root: Path) -> Path:
    """``root/files`` with everything a user brings, and an empty workspace in ``root/ws``; returns the latter."""
    files = root / "files"
    files.mkdir(parents=True)
    model_folder(files / "model")
    for task in ANSWERS:
        suite_file(files / f"{task}.yaml", task)
        lines(files / f"{task}.jsonl", training_rows(task))
    (root / "ws").mkdir()
    (root / "ws/meristem.yaml").write_text(CONFIG)
    return root / "ws"


def configure(folder: Path, **replaced: str) -> None:
    """Replace lines ``  key: ...`` of the workspace's defaults, or add them."""
    text = (folder / "meristem.yaml").read_text()
    for key, value in replaced.items():
        kept = [line for line in text.splitlines() if not line.startswith(f"  {key}:")]
        at = kept.index("defaults:") + 1
        text = "\n".join([*kept[:at], f"  {key}: {value}", *kept[at:]]) + "\n"
    (folder / "meristem.yaml").write_text(text)


def gates(folder: Path, *gates: str) -> None:
    """Replace the policy's gates by these, each in YAML's short form."""
    text = (folder / "meristem.yaml").read_text()
    before, _, rest = text.partition("  gates:\n")
    after = [line for line in rest.splitlines() if not line.startswith("    - {gate")]
    listed = "".join(f"    - {gate}\n" for gate in gates)
    (folder / "meristem.yaml").write_text(f"{before}  gates:\n{listed}" + "\n".join(after) + "\n")


def state(folder: Path) -> dict[str, Any]:
    """All that a workspace holds: the rows of every table and the digest of every file but the database's own."""
    found: dict[str, Any] = {}
    database = folder / ".meristem/meristem.db"
    with sqlite3.connect(database) as connection:
        for (table,) in connection.execute("select name from sqlite_master where type='table' order by name"):
            found[table] = sorted(connection.execute(f"select * from {table}"), key=repr)
    connection.close()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("meristem.db"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files that an interrupted write forgot."""
    return [
        str(p) for p in (folder / ".meristem").rglob(".*") if p.name.startswith((".tmp", ".meristem.yaml"))
    ]
