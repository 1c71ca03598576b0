"""``meristem report``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show


def report(
    model: str,
    out: Annotated[Path | None, typer.Option(help="The HTML file.", show_default="MODEL-report.html")] = None,
    as_json: JSON = False,
) -> None:
    """One self-contained HTML page about a model: lineage, scores, gates, evidence, cost."""
    from meristem.web.report import write_report

    with opened() as ws:
        path = write_report(ws, model, out or Path(f"{model}-report.html"))
        show(as_json, {"report": str(path)}, str(path))
