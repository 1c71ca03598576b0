"""Packs in a folder of the local file system.

A pack becomes visible only whole: written under a temporary name, synced, read back against its digests, and
only then renamed and its folder synced.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from meristem.errors import EnvironmentFailure, Tampered
from meristem.store import files
from meristem.store.canonical import PREFIX
from meristem.store.files import disk_failure
from meristem.store.pack_format import Blob, Layout, Location, is_pack_name, layout, pack_entries, read_header
from meristem.store.packs import OWNER, Packs, Progress
from meristem.store.threads import spread

_CHUNK = 4 << 20  # bytes between two calls of ``progress``
_BUFFER = 1 << 18  # many small blobs become few system calls
_MAPS = 64  # packs mapped at once: each costs an open file
_SUFFIX = ".safetensors"
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]+)[0-9a-f-]*")  # the start of the pack's name


class LocalPacks(Packs):
    def __init__(self, root: Path):
        self.root = Path(root)

    def path(self, pack: str) -> Path:
        return self.root / f"{pack.removeprefix(PREFIX)}{_SUFFIX}"

    def write(
        self, blobs: Iterable[Blob], progress: Progress | None = None, salt: str = ""
    ) -> list[Location]:
        plan = layout(blobs, salt)
        if not plan.blobs:
            return []
        stem = plan.pack.removeprefix(PREFIX)[:16]
        temporary = self.root / f".tmp-{stem}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            files.make_folder(self.root)
            _write_synced(temporary, plan, progress)
            _read_back(temporary, plan)
            temporary.replace(self.path(plan.pack))
            files.sync_folder(self.root)
        except OSError as error:
            raise disk_failure(error, self.root) from error
        finally:
            files.discard(temporary)
        return plan.locations

    def read(self, location: Location) -> bytes:
        # Not from a mapping: see ``views``.
        with self._opened(location.pack) as descriptor:
            body = b"".join(map(bytes, _read(self.path(location.pack), descriptor, location)))
        _check(location, [memoryview(body)])
        return body

    def check(self, location: Location) -> None:
        with self._opened(location.pack) as descriptor:
            _check(location, _read(self.path(location.pack), descriptor, location))

    def views(self, locations: Iterable[Location]) -> Iterator[tuple[Location, memoryview]]:
        mapped = lru_cache(_MAPS)(self._mapped)

        def view(location: Location) -> tuple[Location, memoryview]:
            part = mapped(location.pack)[location.offset : location.end]
            if len(part) != location.length:
                raise Tampered(f"{self.path(location.pack)}: the pack is cut short")
            _check(location, [part])
            return location, part

        locations = list(locations)
        yield from spread(view, locations, size=sum(location.length for location in locations))

    def copy(
        self, places: Iterable[tuple[Location, int]], target: int, progress: Progress | None = None
    ) -> None:
        def copy(place: tuple[Location, int]) -> int:
            location, at = place
            with self._opened(location.pack) as descriptor:
                source = _read(self.path(location.pack), descriptor, location)
                _check(location, _written(source, target, at))
            return location.length

        # In the order of the pack, which is how a disk reads fastest.
        places = sorted(places, key=lambda place: (place[0].pack, place[0].offset))
        done, total = 0, sum(location.length for location, _ in places)
        for length in spread(copy, places, size=total, ahead=len(places)):
            done += length
            if progress:
                progress(done, total)

    def entries(self, pack: str) -> Iterator[Location]:
        path = self.path(pack)
        try:
            yield from pack_entries(pack, *read_header(path))
        except FileNotFoundError as error:
            raise Tampered(f"{path}: the pack is missing") from error
        except ValueError as error:
            raise Tampered(f"{path}: {error}") from error
        except OSError as error:
            raise disk_failure(error, path) from error

    def names(self) -> Iterator[str]:
        names = (PREFIX + name.removesuffix(_SUFFIX) for name in self._listed() if name.endswith(_SUFFIX))
        yield from sorted(filter(is_pack_name, names))

    def size(self, pack: str) -> int:
        path = self.path(pack)
        try:
            return path.stat().st_size
        except FileNotFoundError as error:
            raise Tampered(f"{path}: the pack is missing") from error
        except OSError as error:
            raise disk_failure(error, path) from error

    def remove(self, pack: str) -> None:
        self._unlink(self.path(pack))

    @property
    def place(self) -> str:
        return str(self.root)

    def owner(self) -> str | None:
        path = self.root / OWNER
        try:
            return path.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_failure(error, path) from error

    def claim(self, store: str) -> None:
        files.write_file_durably(self.root / OWNER, f"{store}\n".encode())

    def leftovers(self) -> Iterator[tuple[str, float]]:
        now = time.time()
        for name in sorted(filter(_TEMPORARY.fullmatch, self._listed())):
            try:
                yield name, max(0.0, now - (self.root / name).stat().st_mtime)
            except FileNotFoundError:  # its writer finished
                continue
            except OSError as error:
                raise disk_failure(error, self.root / name) from error

    def becomes(self, leftover: str, pack: str) -> bool:
        found = _TEMPORARY.fullmatch(leftover)
        return found is not None and pack.startswith(PREFIX + found[1])

    def discard(self, leftover: str) -> None:
        if not _TEMPORARY.fullmatch(leftover):
            raise ValueError(f"'{leftover}' is no temporary of a pack")
        self._unlink(self.root / leftover)

    def _listed(self) -> list[str]:
        try:
            return [path.name for path in self.root.iterdir()]
        except FileNotFoundError:  # nothing was written yet
            return []
        except OSError as error:
            raise disk_failure(error, self.root) from error

    def _unlink(self, path: Path) -> None:
        try:
            if self.root.is_dir():
                path.unlink(missing_ok=True)
                # Also when it was gone: whoever took it may have died before this.
                files.sync_folder(self.root)
        except OSError as error:
            raise disk_failure(error, path) from error

    @contextmanager
    def _opened(self, pack: str) -> Iterator[int]:
        path = self.path(pack)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Tampered(f"{path}: the pack is missing") from error
        except OSError as error:
            raise disk_failure(error, path) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _mapped(self, pack: str) -> memoryview:
        with self._opened(pack) as descriptor:
            try:
                # Closed with the last view of it.
                return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
            except ValueError as error:  # an empty file cannot be mapped
                raise Tampered(f"{self.path(pack)}: the pack is empty") from error
            except OSError as error:
                raise disk_failure(error, self.path(pack)) from error


def _write_synced(path: Path, plan: Layout, progress: Progress | None) -> None:
    done, total = 0, sum(blob.length for blob in plan.blobs)
    with path.open("xb", buffering=_BUFFER) as file:
        file.write(plan.header)
        for blob in plan.blobs:
            view = memoryview(blob.data).cast("B")
            for start in range(0, len(view), _CHUNK):
                done += file.write(view[start : start + _CHUNK])
                if progress:
                    progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def _read_back(path: Path, plan: Layout) -> None:
    with path.open("rb") as file:
        descriptor = file.fileno()

        def whole(location: Location) -> bool:
            return location.check_pieces(files.pieces(descriptor, location.offset, location.length))

        same = os.pread(descriptor, len(plan.header), 0) == plan.header
        if not same or not all(list(spread(whole, plan.locations, size=plan.size))):
            raise EnvironmentFailure(f"{path}: what was read back is not what was written; check the disk")


def _read(path: Path, descriptor: int, location: Location) -> Iterator[memoryview]:
    """The bytes of ``location`` piece by piece, all of them or ``Tampered``."""
    missing = location.length
    try:
        for piece in files.pieces(descriptor, location.offset, location.length):
            missing -= len(piece)
            yield piece
    except OSError as error:
        raise disk_failure(error, path) from error
    if missing:
        raise Tampered(f"{path}: the pack is cut short")


def _written(pieces: Iterable[memoryview], target: int, at: int) -> Iterator[memoryview]:
    """``pieces``, each after it was written to ``target``."""
    for piece in pieces:
        files.write_at(target, piece, at)
        at += len(piece)
        yield piece


def _check(location: Location, pieces: Iterable[memoryview]) -> None:
    if not location.check_pieces(pieces):
        raise Tampered(
            f"pack {location.pack[7:19]}...: the bytes of {location.digest} do not match their digest"
        )
