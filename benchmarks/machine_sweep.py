"""The store contract as a state machine, for as long as you like: Hypothesis looks for steps that break it.

    python -m benchmarks.machine_sweep [--examples 300] [--steps 50]

On SQLite with local packs, and on a PostgreSQL with packs on an S3-speaking server that it starts. Every step is
followed by the invariants of ``meristem.testing.machine``, `log verify` among them. A broken promise ends in the shortest
sequence of steps that shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from tests.servers import postgresql_server, s3_server
from tests.store.test_machine import SHORT, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sweep-machine.json")
    given = parser.parse_args()
    with postgresql_server() as database, s3_server() as packs:
        os.environ.update(database.environ | packs.environ)
        told = [
            run("SQLite, local packs", lambda: (None, None), given.examples, given.steps),
            run(
                "PostgreSQL, packs on S3",
                lambda: (database.database(), packs.prefix()),
                given.examples // 10,
                given.steps,
            ),
        ]
    given.out.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


def run(name: str, place: Callable[[], Any], examples: int, steps: int) -> dict[str, Any]:
    """Raises what the machine found."""
    started = time.monotonic()
    long = settings(SHORT, max_examples=examples, stateful_step_count=steps, derandomize=False)
    run_state_machine_as_test(machine(place), settings=long)
    seconds = round(time.monotonic() - started, 1)
    return {"store": name, "examples": examples, "steps at most": steps, "violations": 0, "seconds": seconds}


if __name__ == "__main__":
    main()
