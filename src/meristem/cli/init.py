"""``meristem init``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.options import JSON, show


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The workspace's folder.")] = Path(),
    as_json: JSON = False,
) -> None:
    """Make a new workspace."""
    from meristem.workspace import Workspace

    ws = Workspace.create(folder)
    ws.close()
    show(as_json, {"workspace": str(folder)}, f"made a workspace in {folder}; its policy is in meristem.yaml")
