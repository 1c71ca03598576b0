"""``meristem signal``"""

from __future__ import annotations

from typing import Annotated

import typer

from meristem.cli.options import JSON, names, opened, show, table

app = typer.Typer(name="signal", help="What starts a turn of the loop.", no_args_is_help=True)


@app.command("add")
def add(
    kind: Annotated[str, typer.Option(help="new-data, regression, incident, base-upgrade, drift, ...")],
    model: Annotated[str, typer.Option()],
    data: Annotated[str | None, typer.Option(help="Data sets, separated by commas.")] = None,
    note: Annotated[str, typer.Option(help="Why.")] = "",
    as_json: JSON = False,
) -> None:
    """Record why an update may be needed."""
    with opened() as ws:
        entry = ws.signal(kind, model, data=names(data), note=note)
        show(as_json, {"id": entry.id, **entry.record.document()}, f"{entry.id}: {kind} for {model}")


@app.command("close")
def close(
    name: Annotated[str, typer.Argument(metavar="ID")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the evidence.")] = "",
    as_json: JSON = False,
) -> None:
    """Take a pending signal back, so that the loop does not answer it."""
    with opened() as ws:
        entry = ws.close_signal(name, reason)
        show(as_json, {"id": entry.id, "status": entry.status}, f"{entry.id} is {entry.status}")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Signals and what became of them."""
    with opened() as ws:
        entries = ws.records("signal")
        rows = [{"id": e.id, "status": e.status, **e.record.document()} for e in entries]
        cells = [(r["id"], r["kind"], r["model"], r["status"], r["note"]) for r in rows]
        show(as_json, rows, table("signals", ("signal", "kind", "model", "status", "note"), cells))
