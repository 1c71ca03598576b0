"""How long `meristem --help` takes against `python -c "import typer"`: the two in turn, medians.

python benchmarks/help_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
COMMANDS = {
    "meristem --help": [str(Path(sys.executable).parent / "meristem"), "--help"],
    "import typer": [sys.executable, "-c", "import typer"],
}


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            taken[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, seconds in medians.items():
        print(f"{name}: {1000 * seconds:.0f} ms")
    print(f"ratio: {medians['meristem --help'] / medians['import typer']:.2f}")


if __name__ == "__main__":
    main()
