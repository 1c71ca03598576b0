"""The database's tables.

``documents`` and ``events`` are the truth: immutable, content-addressed, hash-chained. Every other table is an
index over them, kept in the same transaction, and ``log verify`` recomputes it from the events.
"""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

SCHEMA_VERSION = 1

metadata = MetaData()

settings = Table(
    "settings",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("digest", String, primary_key=True),
    Column("schema", String, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("hash", String, nullable=False, unique=True),
    Column("kind", String, nullable=False, index=True),
    Column("subject", String, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("digest", String, primary_key=True),
    Column("pack", String, nullable=False, index=True),
    Column("offset", Integer, nullable=False),
    Column("length", Integer, nullable=False),
    Column("dtype", String),
    Column("shape", String, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("tier", String, nullable=False),
    Column("base", String),
    Column("document", String, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("digest", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("content", String, nullable=False, index=True),
    UniqueConstraint("model", "number"),
)

assets = Table(
    "assets",
    metadata,
    Column("digest", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("number", Integer, nullable=False),
    UniqueConstraint("kind", "name", "number"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", String, primary_key=True),
    Column("alias", String, primary_key=True),
    Column("version", String, nullable=False),
    Column("revision", Integer, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("model", String, primary_key=True),
    Column("alias", String, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("version", String, nullable=False),
    Column("previous", String),
    Column("event", Integer, nullable=False),
)

# Signals, plans, updates, decisions, approvals and releases: numbered per kind, with a status.
records = Table(
    "records",
    metadata,
    Column("kind", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("model", String, nullable=False, index=True),
    Column("document", String, nullable=False, index=True),
    Column("status", String, nullable=False, index=True),
    Column("result", String),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("content", String, primary_key=True),
    Column("suite", String, primary_key=True),
    Column("engine", String, primary_key=True),
    Column("document", String, nullable=False),
    Column("seconds", Float, nullable=False),
)
