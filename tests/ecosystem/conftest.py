"""Stores with models of a few numbers; nothing here needs torch."""

from __future__ import annotations

import pytest
from tests.ecosystem import hf

from meristem.ecosystem import models
from meristem.store.store import Store


@pytest.fixture
def new_store(tmp_path):
    """``new_store(name)``: an empty store of its own."""
    made = []

    def make(name="store"):
        store = Store(tmp_path / name)
        store.root.mkdir()
        store.database.create()
        made.append(store)
        return store

    yield make
    for store in made:
        store.database.close()


@pytest.fixture
def store(new_store):
    return new_store()


@pytest.fixture
def add(store, tmp_path):
    """``add(name, tier, base=..., source=...)`` to the store; a foundation model gets a folder of its own."""

    def register(name, tier="foundation", *, base=None, source=None, actor="kim"):
        if source is None and base is None:
            source = hf.full(tmp_path / f"source-{name}")
        return models.add(store, actor, name, tier, str(source) if source else None, base)

    return register
