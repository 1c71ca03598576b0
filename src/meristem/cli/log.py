"""``meristem log``"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show, table

app = typer.Typer(name="log", help="The evidence: append-only, hash-chained.", no_args_is_help=True)


@app.command("show")
def show_(
    last: Annotated[int, typer.Option(help="How many of the newest events; 0 for all.")] = 30,
    as_json: JSON = False,
) -> None:
    """Events, oldest first."""
    with opened() as ws:
        events = list(ws.events())[-last:] if last else list(ws.events())
        cells = [(e.sequence, e.time[:19], e.actor, e.kind, e.subject[7:19], e.reason) for e in events]
        columns = ("event", "time", "actor", "kind", "subject", "reason")
        show(as_json, [asdict(e) for e in events], table("events", columns, cells))


@app.command("verify")
def verify(
    head: Annotated[
        str | None, typer.Option(help="A head kept outside the workspace, to catch a cut tail.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Recompute every digest, the chain and every pointer. Exit 1 when anything does not match."""
    with opened() as ws:
        audit = ws.verify(head=head)
        counted = f"{audit.events} events, {audit.documents} documents, {audit.blobs} blobs"
        anchored = (
            "the head kept outside is in the chain"
            if head
            else "no outside head given: a cut tail would not show"
        )
        lines = [f"intact: {counted}; {anchored}", f"head {audit.head}"]
        if not audit.intact:
            lines = [
                f"TAMPERED: {len(audit.problems)} problems in {counted}",
                *(f"  {p}" for p in audit.problems[:20]),
            ]
        show(as_json, {**asdict(audit), "intact": audit.intact}, "\n".join(lines))
        if not audit.intact:
            raise typer.Exit(1)
