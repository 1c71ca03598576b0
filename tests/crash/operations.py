"""The operations that are killed: each is one entry, prepared once and copied for every point.

To add one: a function that prepares ``folder/ws`` (and what a user would bring in ``folder/files``), and an entry in
``OPERATIONS`` with the words of its command. The rest (points, kills, restarts, comparison with an undisturbed run)
follows from them. No torch here, and no training.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from tests.crash import checks

from meristem.config import Recipe
from meristem.ecosystem import ledger
from meristem.ecosystem.records import Decision, Update
from meristem.store.packs import Blob
from meristem.workspace import Workspace

FIXTURE = Path(__file__).parents[1] / "store/fixtures/schema-1.tar.xz"

# What the commands import when they run; ready before the fork.
NEEDED = (
    "meristem.cli.main", "meristem.cli.progress", "meristem.training.updates", "meristem.release.rollout",
    "meristem.release.decisions", "meristem.release.gates", "meristem.ecosystem.gc", "alembic.command", "sqlalchemy.dialects.sqlite", "rich.table", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One command. ``words`` may name ``{files}``.

    ``stand_in`` patches the command's process before it starts. ``atomic``: whatever is read after a crash is the
    state before or the state after; False for work that may be left half-way and goes on from there. ``old_schema``:
    until it is done, the workspace may refuse to be opened.
    """

    name: str
    prepare: Callable[[Path], None]
    words: tuple[str, ...]
    stand_in: Callable[[Path], None] | None = None
    atomic: bool = True
    old_schema: bool = False


def preload() -> None:
    for module in NEEDED:
        importlib.import_module(module)
    cli = importlib.import_module("meristem.cli.main")
    app = typer.main.get_command(cli.build())
    for noun in cli.NOUNS:  # each is imported when it is asked for
        app.get_command(None, noun)


def perform(name: str, folder: Path) -> None:
    """Run an operation as the installed script would; ends in ``SystemExit``."""
    from meristem.cli.main import main

    operation = OPERATIONS[name]
    if operation.stand_in is not None:
        operation.stand_in(folder)
    words = [word.format(files=folder / "files") for word in operation.words]
    sys.argv = ["meristem", "--workspace", str(folder / "ws"), *words]
    main()


def _company(folder: Path) -> None:
    """A base, a model on it, a data set, and the update that would train it; no model file needs torch."""
    files = folder / "files"
    shared = {"embed.weight": b"e" * 512, "norm.weight": b"n" * 16}
    _model(files / "base", {**shared, "head.weight": b"h" * 1024})
    _model(files / "second", {**shared, "head.weight": b"s" * 1024, "bias": b"b" * 64})
    _weights(files / "adapter/adapter_model.safetensors", {"lora_A": b"a" * 2048, "lora_B": b"b" * 64})
    (files / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    row = {"id": "a-1", "task": "a", "prompt": "A ash ?", "completion": "7"}
    (files / "a.jsonl").write_text(json.dumps(row) + "\n")
    ws = Workspace.create(folder / "ws", actor="kim")
    ws.add_model("base", tier="foundation", source=str(files / "base"))
    ws.add_model("support", tier="industrial", base="base")
    data = ws.add_data("a", files / "a.jsonl")
    with ws.store.transaction("kim", "an update") as tx:
        update = Update(
            model="support",
            parent=ws.version("support").digest,
            data=[data.digest],
            recipe=tx.add_document(Recipe().document()),
            method_state=None,
            code={},
        )
        ledger.open_record(tx, "update", update, "support")
    ws.close()


def _decided(folder: Path) -> None:
    """The update is committed, and a decision on its version passed."""
    _company(folder)
    ws = Workspace.open(folder / "ws", actor="kim")
    with _prepared_training(folder):
        made = ws.resume("update-1").made
    assert made is not None
    with ws.store.transaction("kim", "judged") as tx:
        decision = Decision(
            model="support",
            version=made.digest,
            champion=ws.version("support").digest,
            champion_revision=1,
            plan=None,
            policy=tx.add_document(ws.settings("support").policy()),
            evaluations=[],
            gates=[],
            outcome="pass",
            approvals_needed=0,
        )
        ledger.open_record(tx, "decision", decision, "support", status="pass")
    ws.close()


def _promoted(folder: Path) -> None:
    _decided(folder)
    ws = Workspace.open(folder / "ws", actor="kim")
    ws.promote("decision-1")
    ws.close()


def _wasted(folder: Path) -> None:
    """Everything that there is to collect: a version out of use whose pack is half dead, an orphan, a leftover."""
    _company(folder)
    (folder / "ws/meristem.yaml").write_text("schema: meristem/workspace/v1\nretention: {adapter: 0}\n")
    ws = Workspace.open(folder / "ws", actor="kim")
    parent = ws.version("support")
    with _prepared_training(folder):
        ws.resume("update-1")
    _weights(folder / "files/adapter/adapter_model.safetensors", {"lora_A": b"z" * 8, "lora_B": b"b" * 64})
    with ws.store.transaction("kim", "another update") as tx:
        recipe = tx.add_document({**Recipe().document(), "seed": 2})
        first = ws.record("update-1").as_(Update)
        ledger.open_record(tx, "update", first.model_copy(update={"recipe": recipe}), parent.model)
    with _prepared_training(folder):
        ws.resume("update-2")  # the challenger moves on: nothing points at what update-1 made
    ws.store.put([Blob.file(b"nothing names this")])
    ws.close()
    checks.expire_leases(folder / "ws")
    leftover = folder / "ws/.meristem/packs/.tmp-00-1-00"
    leftover.write_bytes(b"half a pack")
    os.utime(leftover, (0, 0))


def _first_schema(folder: Path) -> None:
    """The workspace that the first release made, as the migration's own tests keep it."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder / "old", filter="data")
    (config,) = (folder / "old").rglob("meristem.yaml")
    config.parent.rename(folder / "ws")


def _trained_already(folder: Path) -> None:
    """For a process of its own, to its end."""
    _prepared_training(folder).__enter__()


def _prepared_training(folder: Path) -> AbstractContextManager[Any]:
    """``meristem update resume`` goes straight to its commit: training hands over a prepared adapter."""
    from meristem.training import updates

    trained = updates.Trained(
        weights=folder / "files/adapter",
        states={"ewc": {"tensors": {}, "json": {"tasks": ["a"]}}},
        steps=1,
        tokens=8,
        seconds=1.0,
        curve=[],
    )
    return mock.patch.multiple(
        updates, train=lambda *_args, **_options: trained, _refuse_other_code=lambda _entry: None
    )


def _model(folder: Path, tensors: dict[str, bytes]) -> None:
    _weights(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "of": folder.name}))
    (folder / "tokenizer.json").write_text("{}")


def _weights(path: Path, tensors: dict[str, bytes]) -> None:
    """A safetensors file of bytes."""
    header, position = {}, 0
    for name, data in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(data)],
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    body = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(body)) + body + b"".join(tensors.values()))


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "model add",
            _company,
            ("model", "add", "second", "--tier", "foundation", "--source", "{files}/second"),
        ),
        Operation("update commit", _company, ("update", "resume", "update-1"), stand_in=_trained_already),
        Operation("release promote", _decided, ("release", "promote", "decision-1")),
        Operation("release rollback", _promoted, ("release", "rollback", "support", "--to", "support@v1")),
        Operation("store gc", _wasted, ("store", "gc"), atomic=False),
        Operation("store migrate", _first_schema, ("store", "migrate"), old_schema=True),
    )
}
