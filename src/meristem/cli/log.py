"""``meristem log``"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.options import JSON, opened, show, table
from meristem.errors import BadInput

if TYPE_CHECKING:
    from meristem.ecosystem.audit import Audit
    from meristem.store.checkpoints import Mark

app = typer.Typer(name="log", help="The evidence: append-only, hash-chained, signed.", no_args_is_help=True)

_SHOWN = 20


@app.command("show")
def show_(
    last: Annotated[int, typer.Option(help="How many of the newest events; 0 for all.", min=0)] = 30,
    as_json: JSON = False,
) -> None:
    """Events, oldest first."""
    with opened() as ws:
        events = list(ws.events(last=last or None))
        cells = [(e.sequence, f"{e.time[:19]}Z", e.actor, e.kind, e.subject[7:19], e.reason) for e in events]
        columns = ("event", "time", "actor", "kind", "subject", "reason")
        show(as_json, [asdict(e) for e in events], table("events", columns, cells))


@app.command("verify")
def verify(
    anchor: Annotated[
        Path | None, typer.Option(help="Checkpoints kept outside the workspace (see `log checkpoint`).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="A head kept outside the workspace.")] = None,
    as_json: JSON = False,
) -> None:
    """Recompute every digest, the chain, every signature and every pointer. Exit 1 when anything does not match.

    A cut tail or a log computed anew shows only against something kept outside: an anchor or a head.
    """
    with opened() as ws:
        audit = ws.verify(head=head, anchor=anchor)
        show(as_json, {**asdict(audit), "intact": audit.intact}, "\n".join(_lines(audit)))
        if not audit.intact:
            raise typer.Exit(1)


@app.command("checkpoint")
def checkpoint(
    key: Annotated[Path | None, typer.Option(help="The private key's file.", envvar="MERISTEM_KEY")] = None,
    anchor: Annotated[Path | None, typer.Option(help="Append it to this file outside the workspace.")] = None,
    anchor_command: Annotated[
        str | None,
        typer.Option(help="Let the shell run this command with it, one line, on its standard input."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Sign the head of the log, and keep that outside."""
    if key is None:
        raise BadInput("no key: give `--key FILE` or set MERISTEM_KEY; `meristem key add` makes one")
    with opened() as ws:
        made = ws.checkpoint(key, anchor=anchor, anchor_command=anchor_command)
        document = {"sequence": made.sequence, "head": made.head, "key": made.key, "time": made.time}
        text = f"events 1 to {made.sequence} signed by {made.key[:12]}; head {made.head}"
        if anchor:
            text += f"\nappended to {anchor}"
        if anchor_command:
            text += f"\ngiven to {anchor_command}"
        if not (anchor or anchor_command):
            text += "\nkept in the workspace only: --anchor FILE keeps it where the workspace's writers cannot reach"
        show(as_json, {**document, "signature": made.signature.hex()}, text)


@app.command("export")
def export(
    to: Annotated[Path | None, typer.Option(help="A file to write; without it, standard output.")] = None,
    as_json: JSON = False,
) -> None:
    """The events and after them the checkpoints as JSON Lines, each event in the very bytes that are hashed."""
    with opened() as ws:
        if to is None:
            sys.stdout.buffer.writelines(ws.export_log())
            sys.stdout.buffer.flush()
            return
        ws.export_log_to(to)
        show(as_json, {"file": str(to)}, f"written: {to}")


def _lines(audit: Audit) -> list[str]:
    counted = f"{audit.events} events, {audit.documents} documents, {audit.blobs} blobs"
    if audit.intact:
        return [f"intact: {counted}", *_ranges(audit), f"head {audit.head}"]
    lines = [f"TAMPERED: {audit.problem_count} problems in {counted}"]
    if audit.first_bad is not None:
        lines.append(f"first bad event: {audit.first_bad} ({audit.first_problem})")
    more = audit.problem_count - _SHOWN
    lines += [f"  {problem}" for problem in audit.problems[:_SHOWN]]
    return [*lines, *([f"  and {more} more"] if more > 0 else []), *_ranges(audit)]


def _ranges(audit: Audit) -> list[str]:
    """Up to where something outside vouches for the log, a signature inside, and only the chain itself."""
    lines, begin = [], 1
    for mark, words in (
        (audit.anchored, "anchored outside"),
        (audit.signed, "signed, but only inside the workspace"),
    ):
        if mark is not None and mark.sequence >= begin:
            lines.append(f"events {begin} to {mark.sequence}: {words}{_by(mark)}")
            begin = mark.sequence + 1
    if begin <= audit.events:
        lines.append(f"events {begin} to {audit.events}: only chained; a cut tail would not show")
    return lines


def _by(mark: Mark) -> str:
    return f", by key {mark.key[:12]} at {(mark.time or '')[:19]}Z" if mark.key else ", as a head"
