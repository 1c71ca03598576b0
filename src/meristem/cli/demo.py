"""``meristem demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, show, wants_json


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where to make the demo's workspace.")] = Path(
        "demo-workspace"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every training run.")] = 0,
    as_json: JSON = False,
) -> None:
    """The whole story on a real LLM: a forgetful update is blocked, a better one ships and is taken back."""
    from rich.console import Console

    from meristem.cli.progress import bars
    from meristem.demo.story import run

    console = Console(stderr=wants_json(as_json))
    with bars() as progress:
        report = run(folder, seed, progress, console)
    if wants_json(as_json):
        show(as_json, {"workspace": str(folder), "report": str(report)})
