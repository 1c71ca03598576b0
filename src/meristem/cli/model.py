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
        typer.Option(
            help="`embedded`, hf:ORG/NAME[@REVISION], or a local Hugging Face folder; default: its base as it is"
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that this one is tuned from.")] = None,
    as_json: JSON = False,
) -> None:
    """Register a model; its first version becomes its champion."""
    with opened() as ws:
        made = ws.add_model(name, tier=tier, source=source, base=base)
        show(as_json, _about(ws, made), f"{made.label} is the champion of {name} ({made.digest})")


@app.command("commit")
def commit(
    name: str,
    source: Annotated[str, typer.Option(help="A Hugging Face or PEFT folder, or hf:ORG/NAME[@REVISION].")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the evidence.")] = "",
    as_json: JSON = False,
) -> None:
    """Add weights made elsewhere as successor of the champion; they become the challenger."""
    with opened() as ws:
        made = ws.commit(name, source, reason)
        show(as_json, _about(ws, made), f"{made.label} is the challenger of {name} ({made.digest})")


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Models with their champions."""
    with opened() as ws:
        rows = []
        for model in ws.models():
            found = ws.aliases(model.name)
            labels = ws.labels(alias.version for alias in found)
            pointers = {alias.name: labels[alias.version] for alias in found}
            rows.append({**model.document(), "versions": ws.version_count(model.name), "aliases": pointers})
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
def lineage(
    name: str,
    last: Annotated[int, typer.Option(help="How many of the newest versions; 0 for all.")] = 30,
    as_json: JSON = False,
) -> None:
    """The versions of a model with what each came from."""
    with opened() as ws:
        rows = [_about(ws, version) for version in ws.versions(name, last or None)]
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
        place: dict[str, Any] = {
            "folder": str(made.folder),
            "base": str(made.base_folder) if made.base_folder else None,
        }
        note = f"{made.folder}"
        if made.experts:
            place["experts"] = list(made.experts)
            note += f" (experts, each a PEFT adapter in its folder: {', '.join(made.experts)}; the base is in base)"
        elif made.meristem_alone:
            place["experts"] = []
            note += f" ({made.meristem_alone}; the base is in base)"
        elif made.base_folder:
            note += f" (PEFT adapter; its base is in {made.base_folder})"
        show(as_json, place, note)


@app.command("push")
def push(
    reference: Annotated[str, typer.Argument(metavar="REF")],
    to: Annotated[str, typer.Option(help="An empty folder, or a URL such as s3://bucket/prefix.")],
    as_json: JSON = False,
) -> None:
    """Write a version as a bundle: its documents, bytes and evidence, for another workspace."""
    with opened() as ws:
        made = ws.push(reference, to)
        about = {
            "version": made.version.label,
            "digest": made.version.digest,
            "bundle": made.digest,
            "place": to,
            "documents": made.documents,
            "packs": made.packs,
            "written": made.written,
        }
        note = f"lies in {to}" if made.written else f"lay in {to} already; nothing was written"
        show(as_json, about, f"{made.version.label} ({made.version.digest}) {note}\nbundle {made.digest}")


@app.command("pull")
def pull(
    where: Annotated[
        str, typer.Argument(metavar="WHERE", help="A folder, or a URL such as s3://bucket/prefix.")
    ],
    as_json: JSON = False,
) -> None:
    """Take in a version from a bundle; every byte is checked before anything is written."""
    with opened() as ws:
        got = ws.pull(where)
        aliases = [a.name for a in ws.aliases(got.version.model) if a.version == got.version.digest]
        about = {
            "version": got.version.label,
            "digest": got.version.digest,
            "bundle": got.bundle,
            "from": got.label,
            "aliases": aliases,
            "added": got.added,
            "changed": got.changed,
        }
        where_it_stands = f", {in_words(aliases)} of {got.version.model}" if aliases else ""
        note = where_it_stands if got.added else (" was here; evidence added" if got.changed else " was here")
        show(as_json, about, f"{got.version.label}{note} ({got.version.digest})")


def _about(ws: Workspace, version: VersionEntry) -> dict[str, Any]:
    record = version.record
    names = ws.labels([*record.parents, *([record.base] if record.base else [])])
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
