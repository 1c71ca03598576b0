"""A place for packs belongs to one store, and a store keeps its packs at one place."""

from __future__ import annotations

import pytest

from meristem.ecosystem import gc
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store.packs import OWNER
from meristem.store.store import Store
from meristem.testing.values import tensor


@pytest.fixture
def two(tmp_path):
    """Two workspaces whose `packs:` name the same place."""
    made = []
    for name in ("one", "two"):
        store = Store(tmp_path / name, None, str(tmp_path / "shared"))
        store.root.mkdir()
        store.database.create()
        made.append(store)
    yield made
    for store in made:
        store.database.close()


def commit(store, *values):
    stored = store.put([tensor(value) for value in values])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)


def test_another_workspace_neither_writes_nor_collects_there(two):
    one, other = two
    commit(one, 1.0)
    before = sorted(one.packs.names())
    for change in (lambda: other.put([tensor(2.0)]), lambda: gc.collect(other, "kim", {})):
        with pytest.raises(BadInput, match="belong to another workspace"):
            change()
    assert sorted(one.packs.names()) == before and one.read_blob(tensor(1.0).digest)


def test_a_machine_with_another_place_is_told(two, tmp_path):
    """It would name bytes that nobody else can read."""
    one, _ = two
    commit(one, 1.0)
    elsewhere = Store(one.root, None, str(tmp_path / "mistyped"))
    with pytest.raises(EnvironmentFailure, match="keeps its packs at another place"):
        elsewhere.put([tensor(2.0)])
    assert not (tmp_path / "mistyped").exists()
    elsewhere.database.close()


def test_a_new_database_does_not_take_the_packs_of_a_lost_one(two):
    one, _ = two
    commit(one, 1.0)
    one.database.close()
    one.database.path.unlink()
    again = Store(one.root, None, str(one.packs.root))
    again.database.create()
    with pytest.raises(BadInput, match="belong to another workspace"):
        gc.collect(again, "kim", {})
    again.database.close()


def test_on_an_object_store(tmp_path, s3_url):
    url = s3_url()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        store = Store(tmp_path / name, None, url)
        store.database.create()
        if name == "one":
            commit(store, 1.0)
            assert len(store.packs.owner()) == 32
        else:
            with pytest.raises(BadInput, match="belong to another workspace"):
                store.put([tensor(1.0)])
        store.database.close()


def test_bytes_of_a_lost_pack_are_written_anew(store):
    """A successor that shares tensors with a damaged version brings them back, for both."""
    commit(store, 1.0, 2.0)
    (pack,) = store.packs.names()
    store.packs.path(pack).unlink()
    commit(store, 1.0, 3.0)
    assert store.read_blob(tensor(1.0).digest) and store.read_blob(tensor(3.0).digest)
    assert (store.packs.root / OWNER).exists()
