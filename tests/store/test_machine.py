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


def machine(place):
    """``place()``: URLs of an empty database and an empty place for packs; None for SQLite and for local packs."""

    def make():
        folder, urls = tempfile.TemporaryDirectory(), place()
        store = Store(Path(folder.name), *urls)
        store.database.create()
        store.database.close()

        def again(keep=folder):
            return Store(Path(keep.name), *urls)

        return again

    return type("Machine", (StoreMachine,), {"make": staticmethod(make)})


def test_sqlite_keeps_the_contract():
    run_state_machine_as_test(machine(lambda: (None, None)), settings=SHORT)


def test_postgresql_and_s3_keep_the_contract(postgresql_url, s3_url):
    place = machine(lambda: (postgresql_url(), s3_url()))
    run_state_machine_as_test(place, settings=settings(SHORT, max_examples=4))
