"""``meristem demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where to make the demo's workspace.")] = Path(
        "demo-workspace"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every training run.")] = 0,
) -> None:
    """The whole story on a real LLM: a forgetful update is blocked, a better one ships and is taken back."""
    from meristem.cli.progress import bars
    from meristem.demo.story import run

    with bars() as progress:
        run(folder, seed, progress)
