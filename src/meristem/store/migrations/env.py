"""Alembic's entry: runs on the one connection, inside the one transaction, that ``Database.migrate`` opened."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
