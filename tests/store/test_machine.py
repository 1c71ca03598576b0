"""The store contract as a state machine, on every back end."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from meristem.store.store import Store
from meristem.testing.machine import StoreMachine

SHORT = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def machine(database):
    """``database()``: the URL of an empty database, or None for SQLite."""

    def make():
        folder, url = tempfile.TemporaryDirectory(), database()
        store = Store(Path(folder.name), url)
        store.database.create()
        store.database.close()

        def again(keep=folder):
            return Store(Path(keep.name), url)

        return again

    return type("Machine", (StoreMachine,), {"make": staticmethod(make)})


def test_sqlite_keeps_the_contract():
    run_state_machine_as_test(machine(lambda: None), settings=SHORT)


def test_postgresql_keeps_the_contract(postgresql_url):
    run_state_machine_as_test(machine(postgresql_url), settings=settings(SHORT, max_examples=5))
