"""The tables of the first release (SQLite only; its ``settings`` said ``schema_version = 1``)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_table(
        "documents",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("schema", sa.String, nullable=False, index=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("kind", sa.String, nullable=False, index=True),
        sa.Column("subject", sa.String, nullable=False, index=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("pack", sa.String, nullable=False, index=True),
        sa.Column("offset", sa.Integer, nullable=False),
        sa.Column("length", sa.Integer, nullable=False),
        sa.Column("dtype", sa.String),
        sa.Column("shape", sa.String, nullable=False),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("base", sa.String),
        sa.Column("document", sa.String, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("content", sa.String, nullable=False, index=True),
        sa.UniqueConstraint("model", "number"),
    )
    op.create_table(
        "assets",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.UniqueConstraint("kind", "name", "number"),
    )
    op.create_table(
        "aliases",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("alias", sa.String, primary_key=True),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_table(
        "alias_moves",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("alias", sa.String, primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("previous", sa.String),
        sa.Column("event", sa.Integer, nullable=False),
    )
    op.create_table(
        "records",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("model", sa.String, nullable=False, index=True),
        sa.Column("document", sa.String, nullable=False, index=True),
        sa.Column("status", sa.String, nullable=False, index=True),
        sa.Column("result", sa.String),
    )
    op.create_table(
        "evaluations",
        sa.Column("content", sa.String, primary_key=True),
        sa.Column("suite", sa.String, primary_key=True),
        sa.Column("engine", sa.String, primary_key=True),
        sa.Column("document", sa.String, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )
