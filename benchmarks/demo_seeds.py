"""The demo's story under several seeds: does it hold, and how long does it take?

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --out benchmarks/results/demo-seeds.json

Each seed is one `meristem demo` in a fresh workspace, as a user would run it. A seed that has a row already is
skipped. Prints the table for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import meristem as ms
from meristem.demo.story import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    for seed in args.seeds:
        if seed not in {row["seed"] for row in rows}:
            rows.append(one(seed, args.threads))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=2) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


def one(seed: int, threads: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "demo"
        command = [
            str(Path(sys.executable).parent / "meristem"),
            "demo",
            "--dir",
            str(folder),
            "--seed",
            str(seed),
        ]
        started = time.monotonic()
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        seconds = time.monotonic() - started
        return {
            "seed": seed,
            "exit": done.returncode,
            "seconds": round(seconds),
            "threads": threads,
            "last_line": (done.stderr or done.stdout).strip().splitlines()[-1][:200]
            if done.returncode
            else "",
            **(facts(folder) if (folder / "meristem.yaml").exists() else {}),
        }


def facts(folder: Path) -> dict[str, object]:
    """The outcome and the numbers of each decision, from the demo's own evidence."""
    ws = ms.Workspace.open(folder)
    decisions = [ws.explain(entry.id) for entry in ws.records("decision")]
    found: dict[str, object] = {"outcomes": [d.outcome for d in decisions]}
    for name, decision in zip(("learn", "plain", "protected"), decisions, strict=False):
        found[name] = {
            f"{g.gate} on {g.suite}": {k: round(v, 4) for k, v in g.numbers.items() if isinstance(v, float)}
            for g in decision.gates
        }
    ws.close()
    return found


def table(rows: list[dict]) -> str:
    lines = [
        "| seed | exit | decisions | A after A | A after plain B | lower..upper | A after replay+EWC B | lower..upper | B | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "protected" not in row:
            lines.append(
                f"| {row['seed']} | {row['exit']} | {row.get('outcomes')} |"
                + " - |" * 6
                + f" {row['seconds']} |"
            )
            continue
        learn = row["learn"][f"improvement on {TASKS[0]}"]
        plain = row["plain"][f"non_inferiority on {TASKS[0]}"]
        kept = row["protected"][f"non_inferiority on {TASKS[0]}"]
        new = row["protected"][f"improvement on {TASKS[1]}"]
        lines.append(
            f"| {row['seed']} | {row['exit']} | {', '.join(row['outcomes'])} | {learn['new_score']:.3f} "
            f"| {plain['new_score']:.3f} | {plain['lower']:+.3f}..{plain['upper']:+.3f} "
            f"| {kept['new_score']:.3f} | {kept['lower']:+.3f}..{kept['upper']:+.3f} "
            f"| {new['new_score']:.3f} | {row['seconds']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
