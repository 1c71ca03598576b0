"""``meristem alias``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meristem.cli.options import JSON, names, opened, show, table

app = typer.Typer(name="alias", help="Named pointers of a model, with their history.", no_args_is_help=True)

ALIAS = Annotated[str, typer.Argument(metavar="MODEL@ALIAS", help="e.g. support@canary")]
REASON = Annotated[str, typer.Option(help="Why; it stands in the evidence.")]


@app.command("list")
def list_(model: str, as_json: JSON = False) -> None:
    """The aliases of a model, where they point, and who alone may move the protected ones."""
    with opened() as ws:
        found = ws.aliases(model)
        labels = ws.labels(alias.version for alias in found)
        rows: list[dict[str, Any]] = [
            {
                "alias": alias.name,
                "version": labels[alias.version],
                "digest": alias.version,
                "revision": alias.revision,
                "actors": ws.alias_actors(model, alias.name),
            }
            for alias in found
        ]
        cells = [(r["alias"], r["version"], r["revision"], ", ".join(r["actors"]) or "anyone") for r in rows]
        show(as_json, rows, table("aliases", ("alias", "version", "revision", "moved by"), cells))


@app.command("move")
def move(
    alias: ALIAS,
    to: Annotated[str, typer.Argument(metavar="REF", help="A version, e.g. support@v3")],
    expect: Annotated[
        int | None,
        typer.Option(help="Refuse with exit 4 unless the alias has this revision now; 0: it must be new."),
    ] = None,
    reason: REASON = "",
    as_json: JSON = False,
) -> None:
    """Point an alias of your own at a version; `champion` moves only by a release."""
    model, name = _parts(alias)
    with opened() as ws:
        moved = ws.move_alias(model, name, to, expected=expect, reason=reason)
        label = ws.version(to).label
        document = {
            "alias": alias,
            "version": label,
            "digest": moved.version,
            "revision": moved.revision,
        }
        show(as_json, document, f"{alias} is {label} (revision {moved.revision})")


@app.command("history")
def history(
    alias: ALIAS,
    last: Annotated[int, typer.Option(help="How many of the newest moves; 0 for all.")] = 30,
    as_json: JSON = False,
) -> None:
    """Every move of an alias: from where, to where, by whom, when and why."""
    model, name = _parts(alias)
    with opened() as ws:
        moves = ws.alias_history(model, name, last or None)
        labels = ws.labels(digest for move in moves for digest in (move.version, move.previous) if digest)
        rows: list[dict[str, Any]] = [
            {
                "revision": move.revision,
                "from": labels[move.previous] if move.previous else None,
                "to": labels[move.version],
                "actor": move.actor,
                "time": move.time,
                "reason": move.reason,
                "event": move.event,
            }
            for move in moves
        ]
        columns = ("revision", "from", "to", "actor", "time", "reason")
        cells = [
            (r["revision"], r["from"] or "", r["to"], r["actor"], f"{r['time'][:19]}Z", r["reason"])
            for r in rows
        ]
        show(as_json, rows, table("moves", columns, cells))


@app.command("protect")
def protect(
    alias: ALIAS,
    actors: Annotated[
        str | None, typer.Option(help="Who alone may move it, separated by commas; you among them.")
    ] = None,
    anyone: Annotated[bool, typer.Option("--anyone", help="Lift the protection.")] = False,
    reason: REASON = "",
    as_json: JSON = False,
) -> None:
    """Let only some actors move an alias (`champion`: release to it, or roll it back)."""
    model, name = _parts(alias)
    if bool(names(actors)) == anyone:
        raise typer.BadParameter("give --actors NAME[,NAME...] or --anyone")
    with opened() as ws:
        ws.protect_alias(model, name, names(actors), reason)
        allowed = ws.alias_actors(model, name)
        text = f"{alias} is moved by {', '.join(allowed) or 'anyone'}"
        show(as_json, {"alias": alias, "actors": allowed}, text)


def _parts(alias: str) -> tuple[str, str]:
    model, _, name = alias.partition("@")
    if not (model and name):
        raise typer.BadParameter(f"'{alias}': write MODEL@ALIAS")
    return model, name
