"""The database's tables, at schema ``REVISION``; ``migrations/`` leads there from every earlier one.

``documents`` and ``events`` are the truth: immutable, content-addressed, hash-chained. Every other table is an
index over them, kept in the same transaction, and ``log verify`` recomputes it from the events. Two hold what is true
only here and now and are in no event: ``blobs`` (where bytes lie; rebuilt from the packs) and ``leases``.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

REVISION = "0002"

metadata = MetaData()

# Names and digests sort by their bytes on every back end, whatever the locale of a server.
Text = String().with_variant(String(collation="C"), "postgresql")
Big = BigInteger().with_variant(Integer(), "sqlite")

# Alembic's own table, spelled out: a look at it must not import Alembic.
schema_revision = Table(
    "alembic_version", metadata, Column("version_num", String(32), primary_key=True, nullable=False)
)

settings = Table(
    "settings",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("schema", Text, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Big, primary_key=True, autoincrement=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False, index=True),
    Column("subject", Text, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

# Signed heads of the chain: `body` is what was signed.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("sequence", Big, primary_key=True, autoincrement=False),
    Column("key", Text, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("pack", Text, nullable=False, index=True),
    Column("offset", Big, nullable=False),
    Column("length", Big, nullable=False),
    Column("dtype", Text),
    Column("shape", Text, nullable=False),
)

# A writer's claim on blobs and packs that no document names yet; gc leaves them alone until it ends.
leases = Table(
    "leases",
    metadata,
    Column("id", Text, primary_key=True),
    Column("expires", Float, nullable=False),
)

lease_names = Table(
    "lease_names",
    metadata,
    Column("lease", Text, primary_key=True),
    Column("name", Text, primary_key=True, index=True),
)

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("tier", Text, nullable=False),
    Column("base", Text),
    Column("document", Text, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("content", Text, nullable=False, index=True),
    UniqueConstraint("model", "number"),
)

assets = Table(
    "assets",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("number", Integer, nullable=False),
    UniqueConstraint("kind", "name", "number"),
)

# Versions and assets whose bytes were given up, by a retention rule or on request, and the event that says why.
retired = Table(
    "retired",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("event", Big, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("revision", Integer, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("model", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("version", Text, nullable=False),
    Column("previous", Text),
    Column("event", Big, nullable=False),
)

# Who alone may move a protected alias: one row per actor.
alias_actors = Table(
    "alias_actors",
    metadata,
    Column("model", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("actor", Text, primary_key=True),
)

# Signals, plans, updates, decisions, approvals and releases: numbered per kind, with a status.
records = Table(
    "records",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("model", Text, nullable=False, index=True),
    Column("document", Text, nullable=False, index=True),
    Column("status", Text, nullable=False, index=True),
    Column("result", Text),
    Index("ix_records_line", "kind", "model", "number"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("content", Text, primary_key=True),
    Column("suite", Text, primary_key=True),
    Column("engine", Text, primary_key=True),
    Column("document", Text, nullable=False),
    Column("seconds", Float, nullable=False),
)
