"""A workspace of the first release goes on, with every event as it was."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select

import meristem as ms
from meristem.errors import BadInput
from meristem.store import evidence, migrations
from meristem.store.schema import REVISION, events, metadata, records
from meristem.store.store import Store

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "schema-1.json").read_text())


@pytest.fixture
def first_release(tmp_path):
    """A whole small history made by the first release: see ``fixtures/make_schema_1.py``."""
    with tarfile.open(FIXTURES / "schema-1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (config,) = tmp_path.rglob("meristem.yaml")
    return config.parent


def test_it_is_refused_with_the_way_out(first_release):
    with pytest.raises(BadInput, match=r"schema 0001.*meristem store migrate"):
        ms.Workspace.open(first_release)


def test_it_migrates_with_its_evidence_intact(first_release):
    assert ms.Workspace.migrate(first_release, actor="ops") == ("0001", REVISION)
    ws = ms.Workspace.open(first_release)
    told = list(ws.events())
    assert told[EXPECTED["events"] - 1].hash == EXPECTED["head"]
    assert [(event.kind, event.actor) for event in told[EXPECTED["events"] :]] == [("store.migrated", "ops")]
    assert ws.verify(head=EXPECTED["head"]).problems == []
    for label, digest in EXPECTED["versions"].items():
        assert ws.version(label).digest == digest
    ws.close()
    assert ms.Workspace.migrate(first_release) == (REVISION, REVISION)


def test_the_loop_goes_on_where_it_stopped(first_release, tmp_path):
    """A release made before the migration is taken back after it."""
    ms.Workspace.migrate(first_release)
    ws = ms.Workspace.open(first_release)
    before = ws.version("support@champion")
    other = next(m for m in ws.alias_history("support", "champion") if m.version != before.digest)
    ws.rollback("support", f"support@{other.version}")
    assert ws.version("support@champion").digest == other.version
    ws.checkout("support@champion", tmp_path / "out")
    assert ws.verify().intact
    ws.close()


def shape(database):
    """Every table with its columns and indexes, as SQLite has them."""
    with database.read() as connection:
        found = connection.exec_driver_sql("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2")
        tables = {tuple(row) for row in found if not row.name.startswith("sqlite_autoindex")}
        columns = {
            name: sorted(tuple(c)[1:] for c in connection.exec_driver_sql(f"PRAGMA table_info('{name}')"))
            for kind, name, _ in tables
            if kind == "table"
        }
        return tables, columns


def test_a_migrated_database_is_shaped_like_a_new_one(first_release, tmp_path):
    ms.Workspace.migrate(first_release)
    migrated = Store(first_release / ".meristem").database
    new = Store(tmp_path / "new").database
    new.path.parent.mkdir()
    new.create()
    assert shape(migrated) == shape(new)
    with migrated.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    migrated.close()
    new.close()


def test_a_migration_that_fails_changes_nothing(first_release, monkeypatch):
    database = Store(first_release / ".meristem").database
    before = shape(database)

    def fail(*_, **__):
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as down:
        down.setattr(evidence, "append", fail)
        with pytest.raises(RuntimeError):
            database.migrate("ops")
    assert shape(database) == before
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(events)) == EXPECTED["events"]
        assert connection.scalar(select(func.count()).select_from(records)) == EXPECTED["rows"]["records"]
    assert database.migrate("ops") == ("0001", REVISION)
    database.close()


def test_every_step_leads_to_the_schema_of_this_release():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]
