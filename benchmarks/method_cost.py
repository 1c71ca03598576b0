"""What each method costs beside plain TRL: time per trained token, peak memory, stored state and how that grows.

    python -m benchmarks.method_cost --data FOLDER --out benchmarks/results/method-cost.json

Every variant learns a second task with the adapter and the state that it left after a first one. TRL's SFTTrainer, the
empty seam and the variant run side by side, each a process of its own, and take turns step by step: while one trains the
others wait, so what else the machine does meets them alike. A ratio is the median over the steps (the first left
out) of the ratio of seconds per trained token, replayed rows counted; a step is everything from its start to the next
one's. Peak memory is the process's highest resident set up to its last step, libraries included.

FOLDER holds AG News (train.jsonl.gz with text and label); without --data the demo's ticket routing is used. Results are
added to the file one variant at a time: variants that stand there are not measured again (--again NAME does).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from meristem.ecosystem.sources import open_source
from meristem.errors import BadInput
from meristem.methods.registry import available, load
from meristem.store.files import write_file_durably

Variant = dict[str, Any]

TRL: Variant = {"seam": False, "lean": False, "method": None, "checkpointing": False}
SEAM: Variant = {**TRL, "seam": True, "lean": True}
EMPTY = {
    "TRL": TRL,
    "TRL, gradient checkpointing": {**TRL, "checkpointing": True},
    "empty seam, lean off": {**SEAM, "lean": False},
    "empty seam": SEAM,
}
BESIDE: dict[str, dict[str, Variant]] = {  # measured with a method: what it is also compared with
    "moe-cl": {
        "moe-cl, lean off": {**SEAM, "lean": False, "method": {"name": "moe-cl", "arguments": {}}},
        "moe-cl as two branches": {**TRL, "two_branches": "moe-cl"},
    }
}
LINES = {
    "moe-cl": 1.5,
    "experience-replay": 1.15,
    "ewc": 1.15,
    "o-lora": 1.15,
    "lae": 1.15,
    "old-teacher-distill": 1.6,
    "gpm": 1.3,
}
LINES |= {"empty seam, lean off": 1.05, "empty seam": 1.05}


def main() -> None:
    args = arguments()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"groups": {}, "growth": {}}
    wanted = args.only or ["empty", *available()]
    if "cost" in args.parts:
        with nullcontext(args.model) if args.model else open_source("embedded") as model:
            for name in wanted:
                if name not in found["groups"] or name in args.again:
                    found["groups"][name] = or_refused(partial(group, name, str(model), args))
                    keep(args.out, found)
    if "growth" in args.parts:
        for name in wanted:
            if name != "empty" and (name not in found["growth"] or name in args.again):
                found["growth"][name] = or_refused(partial(grown, name))
                keep(args.out, found)
    print(table(found))


def or_refused(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except BadInput as error:
        return {"refused": str(error)}


def arguments() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: the embedded LLM)")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers that carry LoRA")
    parser.add_argument("--only", nargs="*", help="'empty' and names of methods; default: all")
    parser.add_argument("--again", nargs="*", default=[], help="measure these although the file has them")
    parser.add_argument("--parts", nargs="*", default=["cost", "growth"])
    return parser.parse_args()


def group(name: str, model: str, args: Any) -> dict[str, Any]:
    """The variants of one comparison, measured side by side."""
    variants = dict(EMPTY)
    if name != "empty":
        if "cit" not in load(name).stages:
            raise BadInput(f"works in stages {', '.join(sorted(load(name).stages))}")
        variants = {"TRL": TRL, "empty seam": SEAM, name: {**SEAM, "method": {"name": name, "arguments": {}}}}
        variants |= BESIDE.get(name, {})
    common = {
        "data": str(args.data.resolve()) if args.data else None,
        "dtype": args.dtype,
        "steps": args.steps,
        "batch": args.batch,
        "threads": args.threads,
        "lora": {"layers": args.layers},
        "model": model,
    }
    with tempfile.TemporaryDirectory() as scratch:
        runs = {label: {**common, **one} for label, one in variants.items()}
        learned: dict[str, Any] = {}
        for orders in runs.values():
            # those without a method begin with one adapter
            kind = name if orders["method"] or "two_branches" in orders else "empty seam"
            orders["folder"] = f"{scratch}/{kind}"
            if kind not in learned:
                print(f"{name}: first task of {kind}", file=sys.stderr)
                (learned[kind],) = answers({**orders, "seam": True, "do": "first"})
        found = side_by_side({label: {**orders, "do": "measured"} for label, orders in runs.items()}, name)
    if name in found:
        found[name]["state_bytes"] = learned[name]["state_bytes"]
    settings = {k: v for k, v in common.items() if k != "model"} | {
        "data": args.data.name if args.data else "demo"
    }
    return {"settings": settings, "runs": found}


def answers(orders: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one worker that waits for nobody."""
    with worker(orders) as process:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{orders['do']} failed: see above")
    found = [json.loads(line) for line in out.splitlines()]
    if "refused" in found[-1]:
        raise BadInput(found[-1]["refused"])
    return found


def worker(orders: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.method_cost_worker", json.dumps(orders)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def side_by_side(runs: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Every run's steps, taken in turns: one step of the first, one of the second, ...; then the other way round."""
    workers = {label: worker(orders) for label, orders in runs.items()}
    steps: dict[str, list[dict[str, float]]] = {label: [] for label in runs}
    ends: dict[str, dict[str, Any]] = {}
    try:
        for process in workers.values():
            heard(process)
        count = next(iter(runs.values()))["steps"]
        for at in range(count):
            for label in list(runs) if at % 2 else list(reversed(runs)):
                steps[label].append(heard(workers[label], "go"))
            print(f"{name}: step {at + 1} of {count}", file=sys.stderr)
        for label, process in workers.items():
            ends[label] = heard(process, "go")
    finally:
        for process in workers.values():
            process.terminate() if process.poll() is None and len(ends) < len(workers) else None
            process.wait()
    return {label: summary(steps[label], ends[label]) for label in runs}


def heard(process: subprocess.Popen[str], word: str | None = None) -> dict[str, Any]:
    assert process.stdin and process.stdout
    if word:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker ended early: see above")
    answer: dict[str, Any] = json.loads(line)
    if "refused" in answer:
        raise BadInput(answer["refused"])
    return answer


def summary(steps: list[dict[str, float]], end: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of each step after the first; ``_total_train_tokens`` counts from the start."""
    tokens = [now["tokens"] - before["tokens"] for before, now in pairwise(steps)]
    return {
        "tokens": tokens,
        "wall": [round(step["wall"], 4) for step in steps[1:]],
        "cpu": [round(step["cpu"], 4) for step in steps[1:]],
        "peak_mib": round(steps[-1]["peak_kib"] / 1024),
        "peak_with_finish_mib": round(end["peak_kib"] / 1024),
        "prepare_cpu": round(end["prepare_cpu"], 2),
        "finish_cpu": round(end["finish_cpu"], 2),
        "losses": end["losses"],
    }


def ratio(run: dict[str, Any], base: dict[str, Any], clock: str) -> float:
    """Median over the steps of (seconds per token of ``run``) / (of ``base``)."""
    per_token = [[s / t for s, t in zip(one[clock], one["tokens"], strict=True)] for one in (run, base)]
    return statistics.median(mine / other for mine, other in zip(*per_token, strict=True))


def apart(run: dict[str, Any], base: dict[str, Any]) -> float:
    return max(abs(mine - other) for mine, other in zip(run["losses"], base["losses"], strict=True))


def grown(name: str) -> dict[str, Any]:
    print(f"{name}: state over 20 tasks", file=sys.stderr)
    found = answers({"do": "growth", "method": {"name": name, "arguments": {}}, "data": None, "threads": 1})
    return {key: [one[key] for one in found] for key in found[0]}


def keep(out: Path, found: dict[str, Any]) -> None:
    write_file_durably(out, (json.dumps(found, indent=1) + "\n").encode())


def table(found: dict[str, Any]) -> str:
    lines = [
        "| variant | line | time / TRL | time / empty seam | tokens/s | peak MiB | / TRL | prepare s | finish s | state kB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["groups"].items():
        if "refused" in one:
            lines.append(f"| {name} | refused: {one['refused']} |")
            continue
        runs = one["runs"]
        for label in runs if name == "empty" else [name, *BESIDE.get(name, {})]:
            lines.append(row(label, runs[label], runs["TRL"], runs["empty seam"]))
    if runs := found["groups"].get("empty", {}).get("runs"):
        far = [f"{label} {apart(run, runs['TRL']):g}" for label, run in runs.items() if label != "TRL"]
        lines += ["", f"Largest difference of a step's loss from TRL's: {'; '.join(far)}."]
    lines += [
        "",
        "| method | " + " | ".join(f"{part} at {n}" for part in ("state", "adapter") for n in MARKS) + " |",
    ]
    lines.append("|---" * (1 + 2 * len(MARKS)) + "|")
    for name, one in found["growth"].items():
        cells = (
            [f"{one[part][n - 1] / 1024:.1f}" for part in ("state", "adapter") for n in MARKS]
            if "refused" not in one
            else [f"refused: {one['refused']}"]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


MARKS = (1, 2, 5, 10, 20)


def row(label: str, run: dict[str, Any], trl: dict[str, Any], seam: dict[str, Any]) -> str:
    cells = [label, str(LINES.get(label, ""))]
    cells += [f"{ratio(run, base, 'wall'):.2f} (cpu {ratio(run, base, 'cpu'):.2f})" for base in (trl, seam)]
    cells += [f"{sum(run['tokens']) / sum(run['wall']):.0f}", str(run["peak_mib"])]
    cells += [
        f"{run['peak_mib'] / trl['peak_mib']:.2f}",
        f"{run['prepare_cpu']:.1f}",
        f"{run['finish_cpu']:.1f}",
    ]
    return "| " + " | ".join([*cells, f"{run.get('state_bytes', 0) / 1000:.1f}"]) + " |"


if __name__ == "__main__":
    main()
