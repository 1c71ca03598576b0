"""``meristem plan``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, in_words, opened, show, table

if TYPE_CHECKING:
    from meristem.ecosystem.ledger import Entry
    from meristem.workspace import Workspace

app = typer.Typer(
    name="plan", help="Plans: what will be trained and by which criteria.", no_args_is_help=True
)


@app.command("make")
def make(model: str, as_json: JSON = False) -> None:
    """Turn the pending signals of a model into its next plan (without carrying it out)."""
    with opened() as ws:
        entry = ws.plan(model)
        if entry is None:
            show(as_json, None, f"no signal is pending for {model}")
        else:
            _show(ws, entry, as_json)


@app.command("show")
def show_(name: Annotated[str, typer.Argument(metavar="ID")], as_json: JSON = False) -> None:
    """One plan with its criteria."""
    with opened() as ws:
        _show(ws, ws.record(name, "plan"), as_json)


@app.command("close")
def close(
    name: Annotated[str, typer.Argument(metavar="ID")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the evidence.")] = "",
    as_json: JSON = False,
) -> None:
    """Give up an open plan and the signals that it answers, so that the loop goes on."""
    with opened() as ws:
        entry = ws.close_plan(name, reason)
        show(as_json, {"id": entry.id, "status": entry.status}, f"{entry.id} is {entry.status}")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Plans and how they ended."""
    with opened() as ws:
        rows = [{"id": e.id, "status": e.status, **e.record.document()} for e in ws.records("plan")]
        cells = [(r["id"], r["model"], r["action"], r["status"], r["reason"]) for r in rows]
        show(as_json, rows, table("plans", ("plan", "model", "action", "status", "reason"), cells))


def _show(ws: Workspace, entry: Entry, as_json: bool) -> None:
    document: dict[str, Any] = {"id": entry.id, "status": entry.status, **entry.record.document()}
    recipe = ws.store.document(document["recipe"]) if document["recipe"] else {}
    methods = [m["name"] for m in recipe.get("methods", [])]
    lines = [
        f"{entry.id} for {document['model']} ({entry.status}): {document['action']}",
        f"  why: {document['reason']}",
    ]
    if document["action"] == "update":
        lines.append(f"  data: {', '.join(ws.asset('dataset', d).label for d in document['data'])}")
        lines.append(
            f"  stage {recipe['stage']}, methods: {', '.join(methods) or 'none'}, budget: {in_words(document['budget'])}"
        )
        lines += [
            f"  gate {c['gate']} on {c['suite']}: {in_words(c['arguments'])}" for c in document["criteria"]
        ]
    show(as_json, {**document, "resolved_recipe": recipe}, "\n".join(lines))
