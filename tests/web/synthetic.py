"""A workspace with models, updates, decisions and releases, made through the store: no model runs."""

from __future__ import annotations

import json
from pathlib import Path

from sqlalchemy import insert

from meristem import config
from meristem.ecosystem import aliases, assets, ledger, versions
from meristem.ecosystem.records import Asset, Content, Model, Update, UpdateOutcome, Version
from meristem.ecosystem.versions import VersionEntry
from meristem.engine.identity import engine_digest
from meristem.evaluation.results import ItemResult
from meristem.evaluation.service import EvaluationEntry, load_suite_asset
from meristem.store.packs import Blob
from meristem.store.schema import models as models_table
from meristem.workspace import UpdateResult, Workspace

ITEMS = 60
EVIL = "<script>alert('pwned')</script>"


def new_workspace(root: Path) -> Workspace:
    """A foundation model ``base`` and an untouched industrial model ``support`` on it."""
    ws = Workspace.create(root, actor="kim")
    blob = Blob.file(b"the weights of base")
    content = Content(kind="full", base=None, tensors={}, files={"weights": blob.digest})
    record = Model(name="base", tier="foundation", base=None, source="embedded", fingerprint=None)
    locations = ws.store.put([blob])
    with ws.store.transaction("kim", "model base added") as tx:
        tx.add_blobs(locations)
        digest = tx.add_document(record.document())
        tx.connection.execute(
            insert(models_table).values(name="base", tier="foundation", base=None, document=digest)
        )
        tx.append("model.added", digest, name="base", tier="foundation", base=None)
        first = Version(model="base", content=content.digest, base=None, parents=[])
        made = versions.create(tx, content, first)
        aliases.move(tx, "base", aliases.CHAMPION, made.digest, 0)
    ws.add_model("support", tier="industrial", base="base")
    return ws


def add_task(ws: Workspace, name: str, folder: Path) -> None:
    """A suite and a data set of one task; the items' prompts carry a script."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": f"{name}-{n}", "prompt": f"Question {n} of {name} {EVIL}", "answer": f"answer {n}"}
        for n in range(ITEMS)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"name: {name}, type: generate, data: {name}.jsonl, metric: exact_match, kind: target"
    suite = f"name: {name}\ntasks:\n  - {{{task}}}\n"
    (folder / f"{name}.yaml").write_text(suite)
    ws.add_suite(name, folder / f"{name}.yaml")
    train = {"prompt": f"Teach {name}: say yes", "completion": "yes", "task": name}
    (folder / f"{name}.train.jsonl").write_text(json.dumps(train) + "\n")
    ws.add_data(name, folder / f"{name}.train.jsonl")


def train(
    ws: Workspace, parent: VersionEntry, data: str, methods: list[str], curve: list[float]
) -> UpdateResult:
    """An update as ``training.updates`` leaves it, with made-up weights and loss."""
    recipe = config.Recipe.model_validate(
        {"methods": [{"name": m, "arguments": {"strength": 50}} for m in methods]}
    )
    dataset = ws.asset("dataset", data)
    blob = Blob.file(f"adapter {parent.label} {data} {methods}".encode())
    base = parent.content if not parent.record.parents else ws.version("base").content
    content = Content(kind="adapter", base=base, tensors={}, files={"adapter": blob.digest})
    locations = ws.store.put([blob])
    with ws.store.transaction("kim", f"update of {parent.label}") as tx:
        tx.add_blobs(locations)
        recipe_digest = tx.add_document(recipe.document())
        assets.add(tx, Asset(kind="recipe", name=parent.model, files={}, facts={"document": recipe_digest}))
        update = Update(
            model=parent.model,
            parent=parent.digest,
            data=[dataset.digest],
            recipe=recipe_digest,
            method_state=None,
            code={},
        )
        entry = ledger.open_record(tx, "update", update, parent.model)
        version = Version(
            model=parent.model,
            content=content.digest,
            base=parent.record.base,
            parents=[parent.digest],
            recipe=recipe_digest,
            data=[dataset.digest],
            tasks=sorted({*parent.record.tasks, *dataset.record.facts["tasks"]}),
        )
        made = versions.create(tx, content, version)
        points = [
            {"step": float(n + 1), "loss": loss, **({"ewc/penalty": 0.01 * n} if "ewc" in methods else {})}
            for n, loss in enumerate(curve)
        ]
        outcome = UpdateOutcome(
            update=entry.digest,
            version=made.digest,
            steps=len(curve),
            tokens=1234,
            seconds=61.5,
            curve=points,
        )
        ledger.set_status(tx, entry, "done", tx.add_document(outcome.document()))
    return ws.update_result(entry.id)


def score(ws: Workspace, version: VersionEntry, suite: str, right: int) -> EvaluationEntry:
    """An evaluation in which the first ``right`` items are right, recorded as the evaluator records one."""
    evaluator, entry = ws.evaluator(), ws.asset("suite", suite)
    results: list[ItemResult] = [
        {
            "task": task.name,
            "id": item.id,
            "slice": None,
            "score": float(index < right),
            "prediction": item.answer if index < right else f"wrong <b>{index}</b>",
            "answer": item.answer,
            "detail": {},
        }
        for task in load_suite_asset(ws.store, entry).tasks
        for index, item in enumerate(task.items)
    ]
    key = (version.content, entry.record.facts["digest"], engine_digest(evaluator.settings))
    return evaluator._record(key, version, entry, results, evaluator.settings, None, 12.5)


def full_story(root: Path) -> Workspace:
    """v2 promoted; v3 blocked for forgetting; v4 promoted, then rolled back."""
    ws = new_workspace(root)
    for task in ("routing", "orders"):
        add_task(ws, task, root / "files")
    ws.signal("new-data", "support", data=["routing"], note=f"tickets of week 47 {EVIL}")
    first = ws.version("support")
    routed = train(ws, first, "routing", [], [2.0, 1.0, 0.5]).version
    for version, task, right in [(first, "routing", 10), (routed, "routing", 55)]:
        score(ws, version, task, right)
    ws.promote(ws.propose(routed))
    forgetful = train(ws, routed, "orders", [], [2.2, 0.8, 0.3]).version
    careful = train(ws, routed, "orders", ["ewc"], [2.2, 1.1, 0.6]).version
    for version, task, right in [
        (routed, "orders", 5),
        (forgetful, "orders", 58),
        (forgetful, "routing", 20),
        (careful, "orders", 52),
        (careful, "routing", 58),
    ]:
        score(ws, version, task, right)
    ws.propose(forgetful)
    ws.promote(ws.propose(careful))
    ws.rollback("support", reason="complaints")
    return ws
