"""``meristem data``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show, table

app = typer.Typer(name="data", help="Training data sets (JSON Lines).", no_args_is_help=True)


@app.command("add")
def add(name: str, file: Annotated[Path, typer.Option(help="JSON Lines.")], as_json: JSON = False) -> None:
    """Check a file and add it as the next version of a data set."""
    with opened() as ws:
        made = ws.add_data(name, file)
        document = {"data": made.label, "digest": made.digest, **made.record.facts}
        show(as_json, document, f"{made.label}: {made.record.facts['rows']} rows ({made.digest})")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Data sets and their versions."""
    with opened() as ws:
        rows = [{"data": e.label, "digest": e.digest, **e.record.facts} for e in ws.data()]
        cells = [(r["data"], r["rows"], r["shape"], ", ".join(r["tasks"])) for r in rows]
        show(as_json, rows, table("data", ("data", "rows", "shape", "tasks"), cells))


@app.command("show")
def show_(name: str, as_json: JSON = False) -> None:
    """One data set: rows, shape, tasks, digests."""
    with opened() as ws:
        entry = ws.asset("dataset", name)
        show(as_json, {"data": entry.label, "digest": entry.digest, **entry.record.document()})
