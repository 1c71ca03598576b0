"""The contract of ``Packs`` as tests. A back end passes them all, or it is none.

A subclass, in a test module, says how to make an empty set of packs and how to damage one::

    class TestMyPacks(PacksContract):
        @pytest.fixture
        def packs(self, tmp_path):
            return MyPacks(tmp_path)

        def body(self, packs, pack):            # the raw bytes of a pack
            return packs.path(pack).read_bytes()

        def set_body(self, packs, pack, body):  # put other bytes in their place; None: take the pack away
            ...

``large`` is a number of bytes beyond which the back end works in another way (parts, rounds, threads).
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from meristem.errors import Tampered
from meristem.store.pack_format import Blob, Location
from meristem.store.packs import Packs
from meristem.testing.values import mixed, sized, tensor

ABSENT = "sha256:" + "0" * 64


class Stop(Exception):
    """Raised in the middle of a write."""


class PacksContract:
    large = 9 << 20

    @pytest.fixture
    def packs(self) -> Packs:
        raise NotImplementedError

    def body(self, packs: Any, pack: str) -> bytes:
        raise NotImplementedError

    def set_body(self, packs: Any, pack: str, body: bytes | None) -> None:
        raise NotImplementedError

    def again(self, packs: Any) -> Packs:
        """The same packs as another process would open them."""
        return packs

    # What is written

    def test_the_owner_is_who_claimed_them(self, packs: Packs) -> None:
        assert packs.owner() is None
        packs.claim("0123456789abcdef")
        assert packs.owner() == "0123456789abcdef"
        assert list(packs.names()) == [] and list(packs.leftovers()) == []

    def test_what_went_in_comes_out(self, packs: Packs) -> None:
        blobs = mixed()
        locations = packs.write(blobs)
        assert {x.digest: packs.read(x) for x in locations} == {b.digest: bytes(b.data) for b in blobs}
        assert {(x.digest, x.dtype, x.shape, x.length) for x in locations} == {
            (b.digest, b.dtype, b.shape, len(b.data)) for b in blobs
        }
        assert len({x.pack for x in locations}) == 1
        assert all(map(packs.intact, locations))

    def test_no_blobs_write_nothing(self, packs: Packs) -> None:
        assert packs.write([]) == []
        assert list(packs.names()) == list(packs.headers()) == list(packs.leftovers()) == []

    def test_the_same_blobs_are_the_same_pack(self, packs: Packs) -> None:
        first = packs.write(mixed())
        body = self.body(packs, first[0].pack)
        assert packs.write(reversed(mixed())) == first
        assert list(packs.names()) == [first[0].pack]
        assert self.body(packs, first[0].pack) == body

    def test_the_name_is_known_before(self, packs: Packs) -> None:
        name = packs.name_of(mixed())
        assert list(packs.names()) == []
        assert {location.pack for location in packs.write(mixed())} == {name}

    def test_a_salt_makes_a_name_of_its_own(self, packs: Packs) -> None:
        """What one writer removes is never what another one wrote."""
        plain, mine, other = (packs.write(mixed(), None, salt) for salt in ("", "mine", "other"))
        assert len({locations[0].pack for locations in (plain, mine, other)}) == 3
        assert packs.name_of(mixed(), "mine") == packs.name_of(plain, "mine") == mine[0].pack
        assert packs.write(mixed(), None, "mine") == mine
        packs.remove(other[0].pack)
        assert all(map(packs.intact, [*plain, *mine]))
        assert list(packs.entries(mine[0].pack)) == mine

    def test_equal_tensors_are_stored_once(self, packs: Packs) -> None:
        locations = packs.write([tensor(1.0), tensor(2.0), tensor(1.0)])
        assert len(locations) == 2
        assert packs.size(locations[0].pack) == min(x.offset for x in locations) + 8

    def test_only_an_empty_file(self, packs: Packs) -> None:
        (location,) = packs.write([Blob.file(b"")])
        assert packs.read(location) == b""
        assert list(packs.entries(location.pack)) == [location]

    def test_a_pack_is_safetensors_and_aligned(self, packs: Packs) -> None:
        locations = packs.write(mixed())
        body = self.body(packs, locations[0].pack)
        length = struct.unpack("<Q", body[:8])[0]
        header = json.loads(body[8 : 8 + length])
        assert header.pop("__metadata__") == {"schema": "meristem/pack/v1"}
        assert set(header) == {blob.name for blob in mixed()}
        width = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1, None: 1}
        assert all(location.offset % width[location.dtype] == 0 for location in locations)
        assert (8 + length) % 8 == 0

    def test_progress_counts_bytes_up_to_all_of_them(self, packs: Packs) -> None:
        seen: list[tuple[int, int]] = []
        packs.write([tensor(*range(10)), Blob.file(b"abc")], lambda *now: seen.append(now))
        assert seen[-1] == (43, 43)
        assert seen == sorted(set(seen))

    def test_a_large_pack(self, packs: Packs) -> None:
        blobs = [sized(self.large + 5), sized(self.large // 2, 1), tensor(1.0), Blob.file(b"")]
        seen: list[tuple[int, int]] = []
        locations = packs.write(blobs, lambda *now: seen.append(now))
        total = sum(len(blob.data) for blob in blobs)
        assert seen[-1] == (total, total)
        assert seen == sorted(set(seen))
        by_digest = {blob.digest: blob.data for blob in blobs}
        found = {location.digest: bytes(view) for location, view in packs.views(locations)}
        assert found == by_digest
        assert all(map(packs.intact, locations))
        assert packs.size(locations[0].pack) == len(self.body(packs, locations[0].pack))

    # Whole or not there

    @pytest.mark.parametrize("size", [100, None])
    def test_a_write_that_breaks_off_leaves_nothing_visible(self, packs: Packs, size: int | None) -> None:
        (other,) = packs.write([tensor(5.0)])
        blob = sized(size or self.large * 4)

        def stop(done: int, total: int) -> None:
            raise Stop

        try:
            packs.write([blob], stop)
        except Stop:
            # Whole and named by nobody it may be, but never in part.
            for pack in packs.names():
                assert all(map(packs.intact, packs.entries(pack)))
        assert packs.intact(other)
        assert list(packs.leftovers()) == []
        (location,) = packs.write([blob])
        assert packs.intact(location)

    def test_others_see_a_whole_pack_or_none(self, packs: Packs) -> None:
        blob = sized(self.large * 2)
        reader, done = self.again(packs), threading.Event()

        def look() -> int:
            looked = 0
            while not done.is_set():
                for pack in reader.names():
                    try:
                        locations = list(reader.entries(pack))
                    except Tampered as error:
                        assert "missing" in str(error)  # a server may list what it does not give yet
                    else:
                        assert all(map(reader.intact, locations))
                looked += 1
            return looked

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            try:
                packs.write([blob])
            finally:
                done.set()
            assert looking.result() > 0

    def test_writers_of_the_same_pack_all_succeed(self, packs: Packs) -> None:
        blobs = [sized(100_000), tensor(1.0)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: self.again(packs).write(blobs), range(8)))
        assert all(result == results[0] for result in results)
        pack = results[0][0].pack
        for _ in range(300):  # a listing may lag behind uploads of one name that met (rclone's does)
            if (listed := list(packs.names())) == [pack]:
                break
            time.sleep(0.1)
        assert listed == [pack]
        assert all(map(packs.intact, results[0]))
        assert list(packs.leftovers()) == []

    def test_writers_of_other_packs_do_not_meet(self, packs: Packs) -> None:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: packs.write([tensor(i), tensor(-1.0)]), range(12)))
        assert len(list(packs.names())) == 12
        assert all(packs.intact(location) for result in results for location in result)

    def test_what_one_wrote_another_sees(self, packs: Packs) -> None:
        other = self.again(packs)
        assert list(other.names()) == []
        (location,) = packs.write([tensor(1.0)])
        assert list(other.names()) == [location.pack]
        assert other.read(location) == tensor(1.0).data
        packs.remove(location.pack)
        assert list(other.names()) == []

    # What is read

    def test_views_come_in_the_order_asked(self, packs: Packs) -> None:
        groups = [packs.write([tensor(i), sized(1000 + i, i), Blob.file(b"")]) for i in range(5)]
        asked = [group[i] for i in (1, 0, 2) for group in groups]
        asked += [asked[3], asked[3]]
        found = list(packs.views(asked))
        assert [location for location, _ in found] == asked
        assert all(location.check(view) and len(view) == location.length for location, view in found)
        assert list(packs.views([])) == []

    def test_copy_puts_bytes_where_they_are_wanted(self, packs: Packs, tmp_path: Any) -> None:
        big = sized(self.large + 3)
        locations = {x.digest: x for x in [*packs.write([big, tensor(1.0)]), *packs.write([tensor(2.0)])]}
        order = [tensor(2.0), big, Blob.file(b""), tensor(1.0), tensor(2.0)]
        locations |= {x.digest: x for x in packs.write([Blob.file(b"")])}
        places, at = [], 7
        for blob in order:
            places.append((locations[blob.digest], at))
            at += len(blob.data)
        seen: list[tuple[int, int]] = []
        with (tmp_path / "out").open("wb") as file:
            packs.copy(iter(places), file.fileno(), lambda *now: seen.append(now))
        assert (tmp_path / "out").read_bytes() == bytes(7) + b"".join(bytes(b.data) for b in order)
        assert seen[-1] == (at - 7, at - 7)

    def test_a_target_that_refuses_is_not_translated(self, packs: Packs) -> None:
        (location,) = packs.write([tensor(1.0)])
        reading, writing = os.pipe()  # a pipe has no places
        try:
            with pytest.raises(OSError):
                packs.copy([(location, 0)], writing)
        finally:
            os.close(reading)
            os.close(writing)

    def test_the_packs_alone_say_where_everything_lies(self, packs: Packs) -> None:
        written = [packs.write(group) for group in (mixed(), [tensor(9.0)], [Blob.file(b"alone")])]
        assert sorted(packs.names()) == list(packs.names()) == sorted(group[0].pack for group in written)
        assert set(packs.headers()) == {location for group in written for location in group}
        assert set(packs.entries(written[0][0].pack)) == set(written[0])

    def test_a_header_longer_than_one_read(self, packs: Packs) -> None:
        blobs = [Blob.file(str(i).encode()) for i in range(700)]
        locations = packs.write(blobs)
        assert list(packs.entries(locations[0].pack)) == locations
        assert len(list(packs.views(locations))) == 700

    # Damage

    @pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
    def test_damage_is_told_as_such(self, packs: Packs, tmp_path: Any, damage: str) -> None:
        *_, last = packs.write([tensor(1.0, 2.0), Blob.file(b"hello")])
        body = self.body(packs, last.pack)
        changed = {"flip": body[:-1] + b"?", "cut": body[:-1], "empty": b"", "remove": None}[damage]
        self.set_body(packs, last.pack, changed)
        self._is_refused(packs, last, tmp_path)
        if damage != "flip":
            with pytest.raises(Tampered):
                list(packs.entries(last.pack))

    def _is_refused(self, packs: Packs, location: Location, folder: Any) -> None:
        assert not packs.intact(location)
        with pytest.raises(Tampered):
            packs.check(location)
        with pytest.raises(Tampered):
            packs.read(location)
        with pytest.raises(Tampered):
            list(packs.views([location]))
        with (folder / "out").open("wb") as file, pytest.raises(Tampered):
            packs.copy([(location, 0)], file.fileno())

    def test_every_byte_is_covered(self, packs: Packs) -> None:
        """By the pack's name or by the digest of an entry."""
        locations = packs.write([tensor(1.0, 2.0), Blob.file(b"abc")])
        pack, start = locations[0].pack, min(location.offset for location in locations)
        good = self.body(packs, pack)
        for at in range(len(good)):
            self.set_body(packs, pack, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            if at < start:
                with pytest.raises(Tampered):
                    list(packs.entries(pack))
            else:
                assert not all(map(packs.intact, packs.entries(pack)))
        self.set_body(packs, pack, good + b"\0")
        with pytest.raises(Tampered):
            list(packs.entries(pack))

    def test_damage_in_the_middle_of_something_large(self, packs: Packs, tmp_path: Any) -> None:
        first, *_ = packs.write([sized(self.large + 9)])
        body = bytearray(self.body(packs, first.pack))
        body[len(body) // 2] ^= 0x40
        self.set_body(packs, first.pack, bytes(body))
        self._is_refused(packs, first, tmp_path)

    def test_a_damaged_pack_is_mended_by_writing_it_again(self, packs: Packs) -> None:
        (location,) = packs.write([tensor(1.0)])
        body = self.body(packs, location.pack)
        for damaged in (body[:-1] + b"?", body[:-1], b"", None):
            self.set_body(packs, location.pack, damaged)
            assert packs.write([tensor(1.0)]) == [location]
            assert self.body(packs, location.pack) == body

    @pytest.mark.parametrize("empty", [Blob.file(b""), Blob.tensor("F32", (0, 4), b"")])
    def test_nothing_in_a_missing_pack_is_missing(self, packs: Packs, empty: Blob) -> None:
        location = next(x for x in packs.write([empty, tensor(1.0)]) if x.digest == empty.digest)
        assert packs.intact(location)
        packs.remove(location.pack)
        assert not packs.intact(location)

    def test_an_unknown_pack(self, packs: Packs) -> None:
        for ask in (packs.size, lambda pack: list(packs.entries(pack))):
            with pytest.raises(Tampered, match="missing"):
                ask(ABSENT)
        assert not packs.intact(Location(tensor(1.0).digest, ABSENT, 0, 4, "F32", (1,)))

    @pytest.mark.parametrize("change", ["offset", "length", "shape", "dtype"])
    def test_a_location_that_lies(self, packs: Packs, tmp_path: Any, change: str) -> None:
        """As a damaged row of the index would name it."""
        true, *_ = packs.write([tensor(1.0, 2.0)])
        lies = {"offset": 1 << 40, "length": 1 << 20, "shape": (1, 2), "dtype": "I32"}
        false = Location(**{**true.__dict__, change: lies[change]})
        self._is_refused(packs, false, tmp_path)

    # Removal

    def test_removal_is_final_and_may_be_repeated(self, packs: Packs) -> None:
        (kept,), (gone,) = packs.write([tensor(1.0)]), packs.write([tensor(2.0)])
        for _ in range(2):
            packs.remove(gone.pack)
        assert list(packs.names()) == [kept.pack]
        assert packs.intact(kept) and not packs.intact(gone)
        packs.remove(ABSENT)
        assert packs.write([tensor(2.0)]) == [gone]
        assert packs.intact(gone)

    def test_removal_from_nothing(self, packs: Packs) -> None:
        packs.remove(ABSENT)
        assert list(packs.names()) == []

    @pytest.mark.parametrize(
        "name", ["", "..", "meristem.db", "../x", ABSENT[7:] + ".safetensors", ".tmp-a/../x"]
    )
    def test_only_leftovers_are_discarded(self, packs: Packs, name: str) -> None:
        with pytest.raises(ValueError):
            packs.discard(name)

    def test_leftovers_are_told_with_their_age_and_taken_away(self, packs: Packs) -> None:
        (location,) = packs.write([tensor(1.0)])
        if not (made := self.leave(packs)):
            pytest.skip("this back end leaves none")
        found = dict(packs.leftovers())
        assert len(found) == made
        assert all(0 <= age < 3600 for age in found.values())
        assert not any(packs.becomes(name, location.pack) for name in [*found, "notes.txt"])
        assert list(packs.names()) == [location.pack]
        for _ in range(2):
            for name in found:
                packs.discard(name)
        assert list(packs.leftovers()) == []
        assert packs.intact(location)

    def leave(self, packs: Any) -> int:
        """Leave temporaries as a killed writer does; how many."""
        return 0
