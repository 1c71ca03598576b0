"""``meristem release``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, opened, show, table

if TYPE_CHECKING:
    from meristem.workspace import DecisionResult, Workspace

app = typer.Typer(name="release", help="Decisions, promotions, rollbacks.", no_args_is_help=True)

ID = Annotated[str, typer.Argument(metavar="ID", help="e.g. decision-1")]
REASON = Annotated[str, typer.Option(help="Why; it stands in the evidence.")]

_EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}


@app.command("propose")
def propose(reference: Annotated[str, typer.Argument(metavar="REF")], as_json: JSON = False) -> None:
    """Judge a version against the champion. Exit 0 pass, 1 fail, 3 inconclusive."""
    with opened() as ws:
        decision = ws.propose(reference)
        _show(ws, decision, as_json)
        raise typer.Exit(_EXIT[decision.outcome])


@app.command("explain")
def explain(name: ID, as_json: JSON = False) -> None:
    """The gates of a decision with their numbers and reasons."""
    with opened() as ws:
        _show(ws, ws.explain(name), as_json)


@app.command("approve")
def approve(name: ID, reason: REASON = "", as_json: JSON = False) -> None:
    """Approve a passed decision."""
    with opened() as ws:
        entry = ws.approve(name, reason)
        missing = ws.explain(name).approvals_missing
        text = f"{entry.id} by {ws.actor}; " + (f"{missing} more needed" if missing else "ready to promote")
        show(as_json, {"id": entry.id, "missing": missing, **entry.record.document()}, text)


@app.command("promote")
def promote(name: ID, reason: REASON = "", as_json: JSON = False) -> None:
    """Make the decided version the champion. Exit 4 if the champion moved meanwhile."""
    with opened() as ws:
        _released(ws, ws.promote(name, reason), as_json)


@app.command("rollback")
def rollback(
    model: str,
    to: Annotated[str | None, typer.Option(help="A version that was champion before.")] = None,
    expect: Annotated[
        int | None, typer.Option(min=1, help="Only if the champion's revision is this one; else exit 4.")
    ] = None,
    reason: REASON = "",
    as_json: JSON = False,
) -> None:
    """Point the champion back at the version before it (bytes checked, nothing recomputed).

    Each call without --to goes one release further back. After an interruption look at `release history` first. With
    --to or --expect the command is safe to repeat.
    """
    with opened() as ws:
        _released(ws, ws.rollback(model, to, reason, expected=expect), as_json)


@app.command("history")
def history(
    model: str,
    last: Annotated[int, typer.Option(help="How many of the newest; 0 for all.")] = 30,
    as_json: JSON = False,
) -> None:
    """Promotions and rollbacks of a model, oldest first."""
    with opened() as ws:
        rows = [{"id": e.id, **e.record.document()} for e in ws.history(model, last or None)]
        names = ws.labels(row[key] for row in rows for key in ("previous", "version"))
        cells = [
            (r["id"], r["kind"], names[r["previous"]], names[r["version"]], r["revision"], r["reason"])
            for r in rows
        ]
        show(as_json, rows, table("releases", ("release", "kind", "from", "to", "revision", "reason"), cells))


def _released(ws: Workspace, entry: Any, as_json: bool) -> None:
    document = entry.record.document()
    model = document["model"]
    text = f"{entry.id}: the champion of {model} is {ws.version(f'{model}@champion').label}"
    show(as_json, {"id": entry.id, **document}, text)


def _show(ws: Workspace, decision: DecisionResult, as_json: bool) -> None:
    record = decision.record
    names = ws.labels([record.version, record.champion])
    lines = [
        f"{decision.id}: {names[record.version]} against {names[record.champion]}: {record.outcome.upper()}"
    ]
    for gate in record.gates:
        lines.append(f"  {gate.outcome:<12}  {gate.gate} on {gate.suite}: {gate.reason}")
    if decision.approvals_missing:
        lines.append(f"  {decision.approvals_missing} approvals are missing")
    show(as_json, {"id": decision.id, "approvals": decision.approvals, **record.document()}, "\n".join(lines))
