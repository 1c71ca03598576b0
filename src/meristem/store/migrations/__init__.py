"""The way from every earlier schema to ``schema.REVISION``, one Alembic revision per step.

A revision spells its tables out: it must go on making what it made, whatever ``schema.py`` says later.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection


def upgrade(connection: Connection, found: str, to: str) -> None:
    """Lead the tables behind ``connection`` from revision ``found`` to ``to``, inside the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.stamp(config, found)
    command.upgrade(config, to)
