"""``meristem suite``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show, table

app = typer.Typer(name="suite", help="Evaluation suites.", no_args_is_help=True)


@app.command("add")
def add(name: str, file: Annotated[Path, typer.Option(help="YAML.")], as_json: JSON = False) -> None:
    """Check a suite file with all its items and add it as the next version of a suite."""
    with opened() as ws:
        made = ws.add_suite(name, file)
        document = {"suite": made.label, **made.record.facts}
        show(as_json, document, f"{made.label}: {made.record.facts['items']} items ({made.digest})")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Suites and their versions."""
    with opened() as ws:
        rows = [{"suite": e.label, **e.record.facts} for e in ws.suites()]
        cells = [(r["suite"], r["items"], ", ".join(r["tasks"]), ", ".join(r["kinds"])) for r in rows]
        show(as_json, rows, table("suites", ("suite", "items", "tasks", "kinds"), cells))


@app.command("show")
def show_(name: str, as_json: JSON = False) -> None:
    """One suite: tasks, items, digests."""
    with opened() as ws:
        entry = ws.asset("suite", name)
        show(as_json, {"suite": entry.label, "asset": entry.digest, **entry.record.document()})
