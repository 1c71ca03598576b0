"""Packs in a folder: the contract, that they are safetensors, and that the store writes nothing twice."""

from __future__ import annotations

import json
import os
import struct
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from meristem.errors import BadInput
from meristem.store import index
from meristem.store.canonical import digest_bytes
from meristem.store.index import location_of
from meristem.store.local_packs import LocalPacks
from meristem.store.pack_format import Blob, encode_header, pack_entries, safetensors_entries
from meristem.store.schema import blobs as table
from meristem.store.threads import spread
from meristem.testing.packs import PacksContract, sized
from meristem.testing.values import mixed, tensor


class TestLocal(PacksContract):
    @pytest.fixture
    def packs(self, tmp_path):
        return LocalPacks(tmp_path / "packs")

    def body(self, packs, pack):
        return packs.path(pack).read_bytes()

    def set_body(self, packs, pack, body):
        if body is None:
            packs.path(pack).unlink()
        else:
            packs.path(pack).write_bytes(body)

    def again(self, packs):
        return LocalPacks(packs.root)

    def leave(self, packs):
        for name in (".tmp-0123456789abcdef-1-aa", ".tmp-0123456789abcdef-2-bb"):
            (packs.root / name).write_bytes(b"half")
        (packs.root / "notes.txt").touch()
        return 2


def test_the_age_of_a_leftover_is_that_of_its_last_write(tmp_path):
    left = tmp_path / ".tmp-0123456789abcdef-1-aa"
    left.touch()
    os.utime(left, (time.time() - 5000,) * 2)
    ((name, age),) = LocalPacks(tmp_path).leftovers()
    assert name == left.name
    assert 4990 < age < 5100


def test_a_temporary_names_its_pack(tmp_path):
    packs, seen = LocalPacks(tmp_path), []
    (location,) = packs.write([tensor(1.0)], lambda *_: seen.extend(packs.leftovers()))
    ((name, _),) = seen
    assert name.startswith(f".tmp-{location.pack[7:23]}-{os.getpid()}-")
    assert packs.becomes(name, location.pack)


def test_views_of_more_packs_than_are_mapped_at_once(tmp_path):
    packs = LocalPacks(tmp_path)
    locations = [packs.write([tensor(i)])[0] for i in range(150)]
    kept = list(packs.views(locations * 2))
    assert all(location.check(view) for location, view in kept)


def test_a_view_outlives_its_pack(tmp_path):
    packs = LocalPacks(tmp_path)
    (location,) = packs.write([sized(100_000)])
    ((_, view),) = packs.views([location])
    packs.remove(location.pack)
    assert location.check(view)
    with pytest.raises(TypeError):
        view[0] = 1


CRAFTED = {
    "no digest": [("weights", "F32", (1,))],
    "half a digest": [("tensor/sha256:00", "F32", (1,))],
    "beyond the end": [("file/sha256:" + "0" * 64, "U8", (9,))],
    "a gap at the end": [("file/sha256:" + "0" * 64, "U8", (3,))],
}


@pytest.mark.parametrize("entries", CRAFTED.values(), ids=CRAFTED)
def test_a_header_that_names_its_pack_is_checked_all_the_same(entries):
    header, _ = encode_header(entries, {})
    with pytest.raises(ValueError):
        pack_entries(digest_bytes(header), header, len(header) + 4)


def test_work_is_spread_in_order_and_stops_at_the_first_failure():
    assert list(spread(lambda i: i * i, range(1000), ahead=3)) == [i * i for i in range(1000)]
    begun = []

    def work(i):
        begun.append(i)
        if i == 5:
            raise ValueError(i)

    with pytest.raises(ValueError):
        list(spread(work, range(100_000), ahead=3))
    assert len(begun) < 50


def test_a_pack_is_a_valid_safetensors_file_with_aligned_tensors(tmp_path):
    packs = LocalPacks(tmp_path)
    locations = packs.write(mixed())
    with safe_open(packs.path(locations[0].pack), framework="np") as file:
        names = set(file.keys())
        assert file.metadata() == {"schema": "meristem/pack/v1"}
        assert file.get_tensor(tensor(1.0, -0.0, 2.5).name).tolist() == [1.0, -0.0, 2.5]
        assert (
            file.get_tensor(Blob.file(b'{"model_type": "tiny"}\n').name).tobytes()
            == b'{"model_type": "tiny"}\n'
        )
    assert names == {blob.name for blob in mixed()}
    width = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1, None: 1}
    assert all(location.offset % width[location.dtype] == 0 for location in locations)


def test_a_tensor_must_fill_its_shape():
    with pytest.raises(ValueError, match="do not fill"):
        Blob.tensor("F32", (3,), bytes(8))


def test_the_index_can_be_rebuilt_from_the_headers(store):
    for group in (mixed(), [tensor(9.0), *mixed()], [Blob.file(b"alone")]):
        locations = store.put(group)
        with store.transaction("kim") as tx:
            tx.add_blobs(locations)
    with store.database.read() as connection:
        known = {location_of(row) for row in connection.execute(table.select())}
    assert set(store.packs.headers()) == known
    assert len(known) == len(mixed()) + 2


def test_what_the_store_holds_is_not_written_again(store):
    stored = store.put(mixed())
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    size = sum(path.stat().st_size for path in store.packs.root.glob("*.safetensors"))
    assert store.put(mixed()).locations == ()
    (new,) = store.put([*mixed(), tensor(5.0)]).locations
    assert (new.digest, new.length) == (tensor(5.0).digest, 4)
    assert sum(path.stat().st_size for path in store.packs.root.glob("*.safetensors")) < size + 300


def test_the_same_locations_twice_are_one_row_each(store):
    stored = store.put(mixed())
    with store.transaction("kim") as tx:
        for _ in range(2):
            index.add(tx.connection, [*stored.locations, *stored.locations])
    assert store.locations(blob.digest for blob in mixed()).keys() == {blob.digest for blob in mixed()}


def test_a_file_dressed_up_as_a_tensor_is_refused(store):
    """Files have the digest that sha256sum prints, so a file can be made to have a tensor's."""
    true = tensor(1.0)
    false = Blob.file(b"meristem/tensor/v1 F32 1\n" + bytes(true.data))
    assert false.digest == true.digest
    with pytest.raises(BadInput, match="share the digest"):
        store.put([true, false])
    stored = store.put([false])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    with pytest.raises(BadInput, match="share the digest"):
        store.put([true])


HEADERS = {
    "empty": b"",
    "short": b"\x01\x02",
    "longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "no json": struct.pack("<Q", 4) + b"abcd",
    "a list": struct.pack("<Q", 2) + b"[]",
}
ENTRIES = {
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "odd dtype": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
    "beyond the end": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "before the start": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
    "negative shape": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
    "wrong length": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
    "a list": [1, 2],
    "three offsets": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
    "a fraction": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
}


@pytest.mark.parametrize("body", HEADERS.values(), ids=HEADERS)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, body):
    (tmp_path / "x.safetensors").write_bytes(body)
    with pytest.raises(ValueError, match="not a safetensors file"):
        safetensors_entries(tmp_path / "x.safetensors")


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_tensor_that_is_not_there_is_refused(tmp_path, entry):
    header = json.dumps({"t": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="tensor t"):
        safetensors_entries(tmp_path / "x.safetensors")


def test_the_library_s_own_files_are_read(tmp_path):
    save_file({"a": np.zeros((2, 3), np.float16), "b": np.ones((), np.int8)}, tmp_path / "x.safetensors")
    found = safetensors_entries(tmp_path / "x.safetensors")
    assert {name: (dtype, shape, length) for name, (dtype, shape, _, length) in found.items()} == {
        "a": ("F16", (2, 3), 12),
        "b": ("I8", (), 1),
    }
