"""``meristem key``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show, table

app = typer.Typer(name="key", help="Keys that sign the evidence.", no_args_is_help=True)

File = Annotated[Path, typer.Option("--file", help="A private key (Ed25519, PEM), outside the workspace.")]


@app.command("add")
def add(
    file: File,
    key: Annotated[
        Path | None,
        typer.Option(help="A key in force, which signs for the new one.", envvar="MERISTEM_KEY"),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Register a key; it is made if the file is not there. The first needs no other key."""
    with opened() as ws:
        public, new = ws.add_key(file, signer=key)
        text = f"key {public} registered" if new else f"key {public} was registered already"
        show(as_json, {"key": public, "file": str(file), "new": new}, text)


@app.command("rotate")
def rotate(
    file: File,
    to: Annotated[Path, typer.Option(help="The new key; made if the file is not there.")],
    as_json: JSON = False,
) -> None:
    """Replace a key: the old one signs for the new one, and nothing after that."""
    with opened() as ws:
        public, new = ws.rotate_key(file, to)
        text = f"key {public} takes its place" if new else f"key {public} had taken its place already"
        show(as_json, {"key": public, "file": str(to), "new": new}, text)


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Public keys, and the events between which each may sign."""
    with opened() as ws:
        keys = ws.keys()
        cells = [
            (key.public, key.since, key.until or "-", "itself" if key.by == key.public else key.by[:12])
            for key in keys
        ]
        columns = ("key", "from event", "until event", "vouched for by")
        show(as_json, [asdict(key) for key in keys], table("keys", columns, cells))
