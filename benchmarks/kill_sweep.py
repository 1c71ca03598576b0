"""Kill anywhere, all of it: every point of every operation, by SIGKILL, ENOSPC and EIO.

    python -m benchmarks.kill_sweep

Run from the root of the repository; needs strace. What a point is and what must hold after it: ``tests/crash/sweep.py``.
Exit 1 when anything is violated.
"""

from __future__ import annotations

import argparse
import json
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import Progress
from tests.crash.nursery import usable
from tests.crash.operations import OPERATIONS
from tests.crash.sweep import Sweep

OUT = Path(__file__).parent / "results/sweep-kill.json"
LIBRARIES = ("meristem", "sqlalchemy", "alembic", "fsspec")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--every", type=int, default=1, help="only every nth point, to try it out")
    args = parser.parse_args()
    if why := usable():
        sys.exit(why)
    started = time.monotonic()
    jobs = [
        (name, share, args.workers, args.every) for name in args.operations for share in range(args.workers)
    ]
    parts: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.workers) as pool, Progress() as progress:
        task = progress.add_task("kill anywhere", total=len(jobs))
        for future in as_completed([pool.submit(_part, *job) for job in jobs]):
            parts.append(future.result())
            progress.advance(task)
    result = _result(parts, args.operations, time.monotonic() - started)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(bool(result["violations"] or result["missed"]))


def _part(name: str, share: int, shares: int, every: int) -> dict[str, Any]:
    """One worker's share of an operation's points."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(OPERATIONS[name], Path(folder) / "sweep")
        try:
            started = time.monotonic()
            done = [
                sweep.run(point, kind)
                for point in sweep.points[::every][share::shares]
                for kind in sweep.kinds(point)
            ]
            seconds = time.monotonic() - started
        finally:
            sweep.close()
    return {
        "operation": name,
        "points": len(sweep.points),
        "seconds": seconds,
        "runs": Counter(one.kind for one in done),
        "sync order": sweep.sync_problems if share == 0 else [],
        "missed": [f"{name}, {one.point}, {one.kind}" for one in done if one.missed],
        "violations": [
            {"operation": name, "point": str(one.point), "kind": one.kind, "problems": one.problems}
            for one in done
            if one.problems
        ],
    }


def _result(parts: list[dict[str, Any]], names: list[str], seconds: float) -> dict[str, Any]:
    violations = [found for part in parts for found in part["violations"]]
    violations += [
        {
            "operation": part["operation"],
            "point": "the undisturbed trace",
            "kind": "order of syncs",
            "problems": [told],
        }
        for part in parts
        for told in part["sync order"]
    ]
    operations = {}
    for name in names:
        mine = [part for part in parts if part["operation"] == name]
        runs: Counter[str] = sum((part["runs"] for part in mine), Counter())
        operations[name] = {"points": mine[0]["points"], "runs": dict(runs)}
    total = sum(sum(part["runs"].values()) for part in parts)
    return {
        "operations": operations,
        "runs": total,
        "violations": sorted(violations, key=lambda found: (found["operation"], found["point"])),
        "missed": sorted(missed for part in parts for missed in part["missed"]),
        "seconds": round(seconds, 1),
        "seconds per run": round(sum(part["seconds"] for part in parts) / max(total, 1), 3),
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "strace": subprocess.run(["strace", "-V"], capture_output=True, text=True).stdout.split()[3],
            **{library: version(library) for library in LIBRARIES},
        },
    }


if __name__ == "__main__":
    main()
