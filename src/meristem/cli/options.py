"""Global options and what every command shares: the workspace, JSON output, progress bars."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.startup import collector_at_rest

if TYPE_CHECKING:
    from meristem.workspace import Workspace


@dataclass
class _Globals:
    workspace: Path | None = None
    json: bool = False
    actor: str | None = None


_given = _Globals()

JSON = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        from meristem import __version__

        typer.echo(f"meristem {__version__}")
        raise typer.Exit


def globals_(
    workspace: Annotated[
        Path | None,
        typer.Option(
            help="The workspace's folder.",
            show_default="MERISTEM_WORKSPACE, or the nearest parent with a meristem.yaml",
        ),
    ] = None,
    actor: Annotated[
        str | None, typer.Option(help="Who does this.", show_default="MERISTEM_ACTOR, or the login name")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    _given.workspace, _given.json, _given.actor = workspace, as_json, actor


@contextmanager
def opened() -> Iterator[Workspace]:
    """The workspace that the options name, with progress bars on stderr."""
    with collector_at_rest():
        from meristem.cli.progress import bars
        from meristem.workspace import Workspace

    with bars() as progress:
        ws = Workspace.open(_folder(), actor=_given.actor, progress=progress)
        try:
            yield ws
        finally:
            ws.close()


def migrated() -> tuple[str, str]:
    """Lead the workspace that the options name to this schema; returns the revisions ``(from, to)``."""
    from meristem.workspace import Workspace

    return Workspace.migrate(_folder(), actor=_given.actor)


def _folder() -> Path:
    if _given.workspace is not None:
        return _given.workspace
    if "MERISTEM_WORKSPACE" in os.environ:
        return Path(os.environ["MERISTEM_WORKSPACE"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "meristem.yaml").exists():
            return folder
    return here


def show(as_json: bool, document: Any, text: str | None = None) -> None:
    """Print ``document`` as JSON, or ``text`` for people.

    A reader that has seen enough (``| head``) changes neither the work nor its exit code.
    """
    if as_json or _given.json or text is None:
        text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    if text:
        try:
            typer.echo(text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def names(text: str | None) -> list[str]:
    """``"a, b"`` as ``["a", "b"]``."""
    return [name for part in (text or "").split(",") if (name := part.strip())]


def given_actor() -> str | None:
    """Who ``--actor`` names."""
    return _given.actor


def wants_json(as_json: bool) -> bool:
    return as_json or _given.json


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for people; plain text when stdout is not a terminal."""
    if not rows:
        return f"no {title} yet"
    from rich.console import Console
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def in_words(value: Any) -> str:
    """A JSON value as people write it: ``margin 0.1, confidence 0.95``; ``-`` for nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(found)}" for key, found in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "-"
    return "-" if value is None else str(value)
