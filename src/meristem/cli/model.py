"""``meristem model``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, in_words, opened, show, table

if TYPE_CHECKING:
    from meristem.ecosystem.versions import VersionEntry
    from meristem.workspace import Workspace

app = typer.Typer(name="model", help="Models and their versions.", no_args_is_help=True)


@app.command("add")
def add(
    name: str,
    tier: Annotated[str, typer.Option(help="foundation, industrial or application")],
    source: Annotated[
        str | None,
        typer.Option(help="`embedded`, or a local Hugging Face folder; default: its base as it is"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that this one is tuned from.")] = None,
    as_json: JSON = False,
) -> None:
    """Register a model; its first version becomes its champion."""
    with opened() as ws:
        made = ws.add_model(name, tier=tier, source=source, base=base)
        show(as_json, _about(ws, made), f"{made.label} is the champion of {name} ({made.digest})")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Models with their champions."""
    with opened() as ws:
        rows = []
        for model in ws.models():
            pointers = {a.name: ws.version(f"{model.name}@{a.name}").label for a in ws.aliases(model.name)}
            rows.append({**model.document(), "versions": len(ws.versions(model.name)), "aliases": pointers})
        cells = [
            (
                r["name"],
                r["tier"],
                r["base"] or "",
                r["versions"],
                ", ".join(f"{k}={v}" for k, v in r["aliases"].items()),
            )
            for r in rows
        ]
        show(as_json, rows, table("models", ("model", "tier", "base", "versions", "aliases"), cells))


@app.command("show")
def show_(reference: Annotated[str, typer.Argument(metavar="REF")], as_json: JSON = False) -> None:
    """One version: digests, parents, tasks, data, recipe."""
    with opened() as ws:
        about = _about(ws, ws.version(reference))
        show(as_json, about, "\n".join(f"{key:>14}  {in_words(value)}" for key, value in about.items()))


@app.command("lineage")
def lineage(name: str, as_json: JSON = False) -> None:
    """Every version of a model with what it came from."""
    with opened() as ws:
        rows = [_about(ws, version) for version in ws.versions(name)]
        cells = [
            (
                r["version"],
                ", ".join(r["parents"]) or r["base"] or "",
                ", ".join(r["aliases"]),
                ", ".join(r["tasks"]),
            )
            for r in rows
        ]
        show(as_json, rows, table("versions", ("version", "from", "aliases", "tasks"), cells))


@app.command("diff")
def diff(first: str, second: str, as_json: JSON = False) -> None:
    """What differs between two versions: tensors, files, tasks, data."""
    with opened() as ws:
        found = ws.diff(first, second)
        lines = [f"{key:>18}  {in_words(value)}" for key, value in found.items()]
        show(as_json, found, "\n".join(lines))


@app.command("checkout")
def checkout(
    reference: Annotated[str, typer.Argument(metavar="REF")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    as_json: JSON = False,
) -> None:
    """Write a version as a plain Hugging Face / PEFT folder."""
    with opened() as ws:
        made = ws.checkout(reference, to)
        place = {"folder": str(made.folder), "base": str(made.base_folder) if made.base_folder else None}
        note = (
            f"{made.folder} (PEFT adapter; its base is in {made.base_folder})"
            if made.base_folder
            else made.folder
        )
        show(as_json, place, str(note))


def _about(ws: Workspace, version: VersionEntry) -> dict[str, Any]:
    names = {v.digest: v.label for model in ws.models() for v in ws.versions(model.name)}
    record = version.record
    return {
        "version": version.label,
        "digest": version.digest,
        "content": version.content,
        "base": names.get(record.base or ""),
        "parents": [names.get(p, p) for p in record.parents],
        "aliases": [a.name for a in ws.aliases(version.model) if a.version == version.digest],
        "tasks": record.tasks,
        "data": [ws.asset("dataset", digest).label for digest in record.data],
        "recipe": record.recipe,
        "assets": record.assets,
        "code": record.code,
    }
