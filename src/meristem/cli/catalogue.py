"""``meristem catalogue``"""

from __future__ import annotations

from meristem.cli.options import JSON, show, table


def catalogue(as_json: JSON = False) -> None:
    """What works so far: catalogue ids with the code and the test that show it."""
    from meristem.catalogue import entries

    found = entries()
    cells = [(e["id"], e["code"], e["test"]) for e in found]
    show(as_json, found, table("entries", ("id", "code", "test"), cells))
