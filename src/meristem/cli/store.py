"""``meristem store``"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.options import JSON, migrated, opened, show

if TYPE_CHECKING:
    from meristem.ecosystem.gc import Collection

app = typer.Typer(
    name="store", help="What the workspace keeps, and the space it takes.", no_args_is_help=True
)

_SHOWN = 20  # lines of a list; --json has all


@app.command("gc")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JSON = False,
) -> None:
    """Retire what the rules in meristem.yaml give up, and free the space of what nothing needs.

    Exit 1 when something had to be left alone, with a line for each.
    """
    with opened() as ws:
        found = ws.collect_garbage(dry_run=dry_run)
        show(as_json, {**asdict(found)}, "\n".join(_lines(found)))
        if found.problems:
            raise typer.Exit(1)


@app.command("verify")
def verify(as_json: JSON = False) -> None:
    """Check every document, pack and pointer, as `log verify` does. Exit 1 when anything does not match."""
    with opened() as ws:
        audit = ws.verify()
        counted = f"{audit.events} events, {audit.documents} documents, {audit.blobs} blobs"
        lines = [f"intact: {counted}"]
        if not audit.intact:
            lines = [f"TAMPERED: {len(audit.problems)} problems in {counted}", *_listed(audit.problems)]
        show(as_json, {**asdict(audit), "intact": audit.intact}, "\n".join(lines))
        if not audit.intact:
            raise typer.Exit(1)


@app.command("reindex")
def reindex(as_json: JSON = False) -> None:
    """Make the index of blobs again from the packs alone. Exit 1 when bytes are in no pack."""
    with opened() as ws:
        found = ws.reindex()
        lines = [f"{found.blobs} blobs in {found.packs} packs"]
        if found.missing:
            lines += [f"{len(found.missing)} blobs are in no pack: restore it from a backup"]
            lines += _listed(found.missing)
        show(as_json, asdict(found), "\n".join(lines))
        if found.missing:
            raise typer.Exit(1)


@app.command("migrate")
def migrate(as_json: JSON = False) -> None:
    """Lead the store of an older Meristem to the schema of this one; back it up first."""
    before, after = migrated()
    text = f"schema {before} led to {after}" if before != after else f"schema {after} already"
    show(as_json, {"from": before, "to": after}, text)


def _lines(found: Collection) -> list[str]:
    would = "would be " if found.dry_run else ""
    lines = [
        f"{would}retired: {len(labels)} {kind} ({', '.join(labels[:_SHOWN])}{', ...' * (len(labels) > _SHOWN)})"
        for kind, labels in found.retired.items()
    ]
    lines += [
        f"{would}dropped: {found.blobs} blobs",
        f"{would}removed: {found.packs} packs, {found.leftovers} leftovers of writers, {found.folders} folders",
        f"{would}packed anew: {found.repacked} packs",
        f"{would}freed: {found.bytes / 1e6:.1f} MB in packs",
    ]
    return [*lines, *_listed(found.problems)] if found.anything or found.problems else ["nothing to collect"]


def _listed(problems: list[str]) -> list[str]:
    return [f"  {problem}" for problem in problems[:_SHOWN]]
