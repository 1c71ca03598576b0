"""``meristem update``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, names, opened, show, table

if TYPE_CHECKING:
    from meristem.workspace import UpdateResult

app = typer.Typer(name="update", help="Training runs that make new versions.", no_args_is_help=True)


@app.command("run")
def run(
    model: str,
    data: Annotated[str, typer.Option(help="Data sets, separated by commas.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="NAME[:key=value,...]; may be given several times.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file that overrides the default recipe.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="cit (instructions), cpt (plain text) or ca (preferences).",
            show_default="the recipe's, else cit",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="lora (an adapter) or full (all weights).", show_default="the recipe's, else lora"),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Train the champion on new data; the same command finishes an interrupted run."""
    from meristem.config import load_recipe

    chosen = {"stage": stage, "weights": weights}
    overrides = {**(load_recipe(recipe) if recipe else {}), **{k: v for k, v in chosen.items() if v}}
    with opened() as ws:
        result = ws.update(model, data=names(data), methods=method, recipe=overrides)
        _show(result, as_json)


@app.command("resume")
def resume(name: Annotated[str, typer.Argument(metavar="ID")], as_json: JSON = False) -> None:
    """Go on with an interrupted update."""
    with opened() as ws:
        _show(ws.resume(name), as_json)


@app.command("close")
def close(
    name: Annotated[str, typer.Argument(metavar="ID")],
    reason: Annotated[str, typer.Option(help="Why it is given up.")] = "",
    as_json: JSON = False,
) -> None:
    """Give up an update that is not done; its checkpoints go."""
    with opened() as ws:
        entry = ws.close_update(name, reason)
        show(as_json, {"id": entry.id, "status": entry.status}, f"{entry.id} is {entry.status}")


@app.command("reproduce")
def reproduce(
    reference: Annotated[str, typer.Argument(metavar="REF", help="update-3, or a version that one made")],
    as_json: JSON = False,
) -> None:
    """Execute an update again and compare every bit. Exit 0 when equal, 1 with the first difference."""
    from meristem.training.reproduce import in_words

    with opened() as ws:
        found = ws.reproduce(reference)
        label = ws.labels([found.version])[found.version]
        told = f"{reference}: bit-equal to {label}"
        if found.difference:
            told = f"{reference} differs from {label}: {in_words(found.difference)}"
        show(as_json, found.document(), told)
        if not found.equal:
            raise typer.Exit(1)


@app.command("show")
def show_(name: Annotated[str, typer.Argument(metavar="ID")], as_json: JSON = False) -> None:
    """One update: manifest, cost, training curve."""
    with opened() as ws:
        result = ws.update_result(name)
        document = {**_document(result), "manifest": result.record.document()}
        if result.outcome:
            document["curve"] = result.outcome.curve
        show(as_json, document)


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Updates and how they ended."""
    with opened() as ws:
        rows = [_document(ws.update_result(e.id)) for e in ws.records("update")]
        cells = [(r["id"], r["model"], r["status"], r["version"] or "", r["seconds"] or "") for r in rows]
        show(as_json, rows, table("updates", ("update", "model", "status", "version", "seconds"), cells))


def _show(result: UpdateResult, as_json: bool) -> None:
    document = _document(result)
    text = f"{result.id}: {document['version']} from {document['parent']} after {document['steps']} steps in {document['seconds']:.0f} s"
    show(as_json, document, text)


def _document(result: UpdateResult) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "id": result.id,
        "model": result.record.model,
        "status": result.entry.status,
        "parent": result.parent.label,
        "version": result.made.label if result.made else None,
        "digest": result.made.digest if result.made else None,
        "steps": outcome.steps if outcome else None,
        "tokens": outcome.tokens if outcome else None,
        "seconds": outcome.seconds if outcome else None,
    }
