"""A store with its tables in place, and blobs to put into it. No torch is needed here."""

from __future__ import annotations

import pytest

from meristem.store.store import Store


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    made.root.mkdir()
    made.database.create()
    yield made
    made.database.close()
