"""PostgreSQL keeps the contract: a real server, with packs on this machine and on a real S3-speaking server."""

from __future__ import annotations

import pytest

from meristem.errors import BadInput, EnvironmentFailure
from meristem.store.postgresql import PostgreSQL
from meristem.store.store import Store
from meristem.testing.database import DatabaseContract


class TestPostgreSQL(DatabaseContract):
    @pytest.fixture
    def open_store(self, tmp_path, postgresql_url):
        self.where = (str(tmp_path), postgresql_url(), None)
        made = []

        def again():
            made.append(Store(tmp_path, *self.where[1:]))
            return made[-1]

        again().database.create()
        yield again
        for store in made:
            store.database.close()

    def place(self, store):
        return self.where


@pytest.mark.parametrize("url", ["mysql://root@localhost/x", "no url", "postgresql:/x"])
def test_other_urls_are_bad_input(url):
    with pytest.raises(BadInput, match="postgresql://user@host/database"):
        PostgreSQL(url)


def test_a_server_that_does_not_answer_is_an_environment_failure(tmp_path):
    store = Store(tmp_path, "postgresql://kim:secret@127.0.0.1:1/x")
    with pytest.raises(EnvironmentFailure, match="check the server") as told:
        store.database.check_schema()
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_database_that_is_not_there_is_an_environment_failure(tmp_path, postgresql_url):
    with pytest.raises(EnvironmentFailure, match="does not exist"):
        Store(tmp_path, postgresql_url() + "x").database.create()


def test_a_commit_is_synced_and_says_so(tmp_path, postgresql_url):
    store = Store(tmp_path, postgresql_url())
    store.database.create()
    with store.database.write() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    assert store.database.problems() == []
