"""Leases, signed checkpoints, retired assets and protected aliases. No row of the first release changes.

Revision 0001 ran on SQLite alone, so the wider numbers and the byte-wise collation that PostgreSQL gets in
``schema.py`` need no step here: SQLite has one integer type, and compares bytes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("expires", sa.Float, nullable=False),
    )
    op.create_table(
        "lease_names",
        sa.Column("lease", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True, index=True),
    )
    op.create_table(
        "retired",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("event", sa.Integer, nullable=False),
    )
    op.create_table(
        "alias_actors",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("alias", sa.String, primary_key=True),
        sa.Column("actor", sa.String, primary_key=True),
    )
    op.create_index("ix_records_line", "records", ["kind", "model", "number"])
    op.execute("DELETE FROM settings WHERE key = 'schema_version'")  # alembic_version says it from here on
