"""``meristem data``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.options import JSON, opened, show, table
from meristem.errors import BadInput

if TYPE_CHECKING:
    from meristem.ecosystem.deletion import Deletion
    from meristem.store.evidence import Event

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
        gone = ws.given_up("dataset")
        rows = [
            {
                "data": e.label,
                "digest": e.digest,
                **e.record.facts,
                "given_up": gone[e.digest].sequence if e.digest in gone else None,
            }
            for e in ws.data()
        ]
        cells = [
            (r["data"], r["rows"], r["shape"], ", ".join(r["tasks"]), _note(gone.get(r["digest"])))
            for r in rows
        ]
        show(as_json, rows, table("data", ("data", "rows", "shape", "tasks", ""), cells))


@app.command("show")
def show_(name: str, as_json: JSON = False) -> None:
    """One data set: rows, shape, tasks, digests; of one that is gone: when, why, and the versions trained on it."""
    with opened() as ws:
        entry = ws.asset("dataset", name)
        about = {"data": entry.label, "digest": entry.digest, **entry.record.document()}
        if event := ws.given_up("dataset").get(entry.digest):
            how = event.kind.partition(".")[2]
            told = {"how": how, "event": event.sequence, "time": event.time, "actor": event.actor}
            about["given_up"] = {**told, "reason": event.reason, "versions": event.data.get("versions", [])}
        show(as_json, about)


@app.command("delete")
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME[@vN]")],
    reason: Annotated[str, typer.Option(help="Why; it is recorded for ever.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really: the rows cannot be brought back.")] = False,
    as_json: JSON = False,
) -> None:
    """Delete a data set (all its versions, or one) for good: on a privacy request. Exit 1: not done yet, repeat it."""
    with opened() as ws:
        entry = ws.asset("dataset", name)
        if not yes:
            what = entry.label if name != entry.name else f"every version of {name}"
            raise BadInput(f"this deletes {what} for good; repeat with --yes")
        found = ws.delete_data(name, reason)
        show(as_json, asdict(found), "\n".join(_lines(found)))
        if found.unfinished:
            raise typer.Exit(1)


def _lines(found: Deletion) -> list[str]:
    lines = [f"{e['label']} deleted (event {e['event']}, {e['digest']})" for e in found.data]
    lines += [f"{e['label']} deleted: it held rows (event {e['event']})" for e in found.states]
    if found.versions:
        labels = ", ".join(e["label"] for e in found.versions)
        lines.append(
            f"trained on it, and kept: {labels}; retrain without it what must not have learned from it"
        )
    return lines + [f"kept: {line}" for line in found.kept]


def _note(event: Event | None) -> str:
    return f"{event.kind.partition('.')[2]} by event {event.sequence}" if event else ""
