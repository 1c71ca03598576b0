"""The real stream ``mixed-4`` (AG News -> Amazon -> DBpedia -> MNLI) through the whole loop, method by method.

    python benchmarks/mixed4.py --data FOLDER --out benchmarks/results --seeds 0 1 2

FOLDER holds one folder per task, named as in ``FOLDERS``, each with ``train.jsonl.gz`` and ``test.jsonl.gz``: lines
of ``{"text": ..., "label": ...}``, the label as words. Sources: AG News, Amazon reviews, DBpedia and MultiNLI as in
``CL_Benchmark`` of github.com/cmnfriend/O-LoRA (TC/agnews, SC/amazon, TC/dbpedia, NLI/MNLI). Rows are sampled plainly,
so classes are only as balanced as the source and chance leave them.

Every run is a line of updates in one workspace: train, evaluate on all four suites, release, next task. The
gates are wide open on purpose (this measures methods, it does not decide releases), and every method gets the
same number of optimizer steps and the same batch size. One result file per method and seed; runs that have one
are skipped, so a broken-off benchmark continues. A result file or a workspace made with other settings is refused.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

import meristem as ms
from meristem.cli.progress import bars
from meristem.store.canonical import PREFIX, digest_document

STREAM = ("agnews", "amazon", "dbpedia", "mnli")
PROMPTS = {
    "agnews": "What is this news about: {options}?",
    "amazon": "How does this review rate the product: {options}?",
    "dbpedia": "What is described here: {options}?",
    "mnli": "Does the first sentence mean that the second is true: {options}?",
}
# Strengths and ratios were chosen on held-out training rows of the demo's tasks, never on this stream.
METHODS = {
    "sequential": [],
    "experience-replay": ["experience-replay:ratio=0.3"],
    "ewc": ["ewc:strength={ewc}"],
    "experience-replay+ewc": ["experience-replay:ratio=0.3", "ewc:strength={ewc}"],
}
FOLDERS = {"agnews": "mtl5_agnews", "amazon": "mtl5_amazon", "dbpedia": "mtl5_dbpedia", "mnli": "cl15_mnli"}
WORDS = 32  # longer inputs are cut to this many words, in training and test alike

CONFIG = """\
schema: meristem/workspace/v1
evaluation: {dtype: bfloat16, device: cpu, batch_tokens: 4096}
defaults:
  gates: [{gate: non_inferiority, suites: all, margin: 1.0}]
"""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with bars() as progress:
        ws = _workspace(args, progress)
        for seed in args.seeds:
            for name in args.methods:
                path = args.out / f"mixed4-{name}-seed{seed}.json"
                if path.exists():
                    refuse_other_settings(path, json.loads(path.read_text()), settings(name, seed, args))
                else:
                    path.write_text(json.dumps(_run(ws, name, seed, args), indent=2) + "\n")
                print(path, flush=True)
    print(table(args.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="see above")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, default=Path("mixed4-workspace"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=["sequential", "experience-replay", "ewc"], choices=METHODS
    )
    parser.add_argument("--train", type=int, default=120, help="training rows per task")
    parser.add_argument("--test", type=int, default=100, help="test items per task")
    parser.add_argument("--steps", type=int, default=36, help="optimizer steps per task, for every method")
    parser.add_argument("--ewc", type=float, default=50.0, help="EWC strength")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _workspace(args: argparse.Namespace, progress: object) -> ms.Workspace:
    if (args.workspace / "meristem.yaml").exists():
        ws = ms.Workspace.open(args.workspace, actor="benchmark", progress=progress)
        for task in STREAM:
            sizes = (
                ws.asset("dataset", task).record.facts["rows"],
                ws.asset("suite", task).record.facts["items"],
            )
            found = dict(zip(("train_rows", "test_items"), sizes, strict=True))
            refuse_other_settings(f"{args.workspace}, {task}", found, settings("sequential", 0, args), found)
        return ws
    args.workspace.mkdir(parents=True)
    (args.workspace / "meristem.yaml").write_text(CONFIG)
    ws = ms.Workspace.create(args.workspace, actor="benchmark", progress=progress)
    ws.add_model("smollm2", tier="foundation", source="embedded")
    for task in STREAM:
        train, suite = _files(args, task)
        ws.add_data(task, train)
        ws.add_suite(task, suite)
    return ws


def _files(args: argparse.Namespace, task: str) -> tuple[Path, Path]:
    """The task's rows as Meristem's data and suite files: a plain sample of the source's."""
    folder = args.workspace / "input"
    folder.mkdir(exist_ok=True)
    rows = {split: _read(args.data / FOLDERS[task] / f"{split}.jsonl.gz") for split in ("train", "test")}
    options = sorted({row["label"] for row in rows["train"]})
    question = PROMPTS[task].format(options=", ".join(options))
    train = folder / f"{task}.train.jsonl"
    test = folder / f"{task}.test.jsonl"
    chosen = random.Random(0).sample(rows["train"], args.train)
    _write(train, [{"prompt": f"{question}\n\n{_cut(r['text'])}", "completion": r["label"]} for r in chosen])
    chosen = random.Random(1).sample(rows["test"], args.test)
    _write(test, [{"text": _cut(r["text"]), "answer": r["label"]} for r in chosen])
    suite = folder / f"{task}.suite.yaml"
    about = {
        "name": task,
        "type": "choice",
        "metric": "accuracy",
        "kind": "target",
        "data": test.name,
        "prompt": f"{question}\n\n{{text}}",
        "options": options,
    }
    suite.write_text(yaml.safe_dump({"name": task, "tasks": [about]}))
    return train, suite


def settings(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a run's result, as its result file says it."""
    return {
        "method": name,
        "methods": [text.format(ewc=args.ewc) for text in METHODS[name]],
        "seed": seed,
        "recipe": {
            "learning_rate": 1e-3,
            "max_steps": args.steps,
            "lora": {"layers": 0.5},
            "seed": seed,
            "max_length": 256,
        },
        "train_rows": args.train,
        "test_items": args.test,
    }


def refuse_other_settings(
    where: object, found: dict[str, Any], wanted: dict[str, Any], keys: Iterable[str] | None = None
) -> None:
    """Exit when ``found`` is of a run with other settings: its numbers would be mixed with the new ones."""
    other = [f"{k} {found.get(k)}, not {wanted[k]}" for k in keys or wanted if found.get(k) != wanted[k]]
    if other:
        raise SystemExit(f"{where}: made with {'; '.join(other)}: give another --out and --workspace")


def _run(ws: ms.Workspace, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    chosen = settings(name, seed, args)
    model = f"{name.replace('+', '-')}-s{seed}-{digest_document(chosen).removeprefix(PREFIX)[:6]}"
    if model not in {m.name for m in ws.models()}:
        ws.add_model(model, tier="industrial", base="smollm2")
    started = time.monotonic()
    for task in STREAM:
        if task not in ws.version(model).record.tasks:  # else: released before this run was broken off
            update = ws.update(model, data=[task], methods=chosen["methods"], recipe=chosen["recipe"])
            ws.promote(ws.propose(update.version))
    outcomes = [ws.update_result(entry.id).outcome for entry in ws.records("update", model)]
    updates = [{"steps": o.steps, "tokens": o.tokens, "seconds": o.seconds} for o in outcomes]
    found = ws.task_matrix(model)
    return {
        **chosen,
        "threads": args.threads,
        **found.to_document(),
        "updates": updates,
        "train_seconds": round(sum(u["seconds"] for u in updates), 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(folder: Path) -> str:
    """Mean and standard deviation over seeds, one line per method."""
    lines = [
        "| method | seeds | ACC | BWT | FWT | forgetting | training s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        runs = [json.loads(p.read_text()) for p in sorted(folder.glob(f"mixed4-{name}-seed*.json"))]
        if runs:
            cells = [_spread([r[key] for r in runs]) for key in ("acc", "bwt", "fwt", "forgetting")]
            seconds = _spread([r["train_seconds"] for r in runs], digits=0)
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _cut(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def _read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
