"""Packs: what is written, that it is whole or not there, and that they alone can rebuild the index."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.store.values import mixed, tensor

from meristem.errors import BadInput, Tampered
from meristem.store.packs import Blob, Packs, safetensors_entries
from meristem.store.schema import blobs as table
from meristem.store.store import location_of


def test_round_trip(tmp_path):
    packs, blobs = Packs(tmp_path), mixed()
    locations = packs.write(blobs)
    assert {location.digest: packs.read(location) for location in locations} == {
        b.digest: bytes(b.data) for b in blobs
    }
    assert {(x.digest, x.dtype, x.shape) for x in locations} == {(b.digest, b.dtype, b.shape) for b in blobs}
    assert all(packs.intact(location) for location in locations)
    assert [path.name for path in tmp_path.iterdir()] == [packs.path(locations[0].pack).name]


def test_nothing_to_store_writes_nothing(tmp_path):
    assert Packs(tmp_path / "packs").write([]) == []
    assert not (tmp_path / "packs").exists()


def test_a_pack_is_a_valid_safetensors_file_with_aligned_tensors(tmp_path):
    packs = Packs(tmp_path)
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


def test_the_same_blobs_make_the_same_pack_and_the_same_blob_is_written_once(tmp_path):
    packs = Packs(tmp_path)
    first = packs.write([tensor(1.0), tensor(2.0), tensor(1.0)])
    assert len(first) == 2
    assert packs.write([tensor(1.0), tensor(2.0)]) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_progress_counts_bytes(tmp_path):
    seen = []
    Packs(tmp_path).write(
        [tensor(*range(10)), Blob.file(b"abc")], lambda done, total: seen.append((done, total))
    )
    assert seen == [(40, 43), (43, 43)]


def test_a_tensor_must_fill_its_shape():
    with pytest.raises(ValueError, match="do not fill"):
        Blob.tensor("F32", (3,), bytes(8))


def test_the_index_can_be_rebuilt_from_the_headers(store):
    for group in (mixed(), [tensor(9.0), *mixed()], [Blob.file(b"alone")]):
        locations = store.put(group)
        with store.transaction("kim") as tx:
            tx.add_blobs(locations)
    with store.database.read() as connection:
        index = {location_of(row) for row in connection.execute(table.select())}
    assert set(store.packs.headers()) == index
    assert len(index) == len(mixed()) + 2


def test_what_the_store_holds_is_not_written_again(store):
    with store.transaction("kim") as tx:
        tx.add_blobs(store.put(mixed()))
    size = sum(path.stat().st_size for path in store.packs.root.iterdir())
    assert store.put(mixed()) == []
    (new,) = store.put([*mixed(), tensor(5.0)])
    assert (new.digest, new.length) == (tensor(5.0).digest, 4)
    assert sum(path.stat().st_size for path in store.packs.root.iterdir()) < size + 300


def test_the_same_locations_twice_are_one_row_each(store):
    locations = store.put(mixed())
    for _ in range(2):
        with store.transaction("kim") as tx:
            tx.add_blobs([*locations, *locations])
    assert store.locations(blob.digest for blob in mixed()).keys() == {blob.digest for blob in mixed()}


def test_a_file_dressed_up_as_a_tensor_is_refused(store):
    """Files have the digest that sha256sum prints, so a file can be made to have a tensor's."""
    true = tensor(1.0)
    false = Blob.file(b"meristem/tensor/v1 F32 1\n" + bytes(true.data))
    assert false.digest == true.digest
    with pytest.raises(BadInput, match="share the digest"):
        store.put([true, false])
    with store.transaction("kim") as tx:
        tx.add_blobs(store.put([false]))
    with pytest.raises(BadInput, match="share the digest"):
        store.put([true])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_told_as_such(tmp_path, damage):
    packs = Packs(tmp_path)
    *_, last = packs.write([tensor(1.0, 2.0), Blob.file(b"hello")])
    path = packs.path(last.pack)
    body = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        body[-1] ^= 1
        path.write_bytes(body if damage == "flip" else body[:-1])
    with pytest.raises(Tampered):
        packs.read(last)
    assert not packs.intact(last)


def test_every_byte_of_a_header_is_covered_by_the_name_of_its_pack(tmp_path):
    packs = Packs(tmp_path)
    locations = packs.write([tensor(1.0), Blob.file(b"x")])
    path = packs.path(locations[0].pack)
    good = path.read_bytes()
    for at in range(min(location.offset for location in locations)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(Tampered):
            list(packs.headers())


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
