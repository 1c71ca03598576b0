"""Packs in an object store: any fsspec file system whose objects become visible whole (S3, GCS, memory).

One pack is one PUT (in parts when it is large; S3 shows the object when the last part is confirmed), so there
is no temporary name and no rename. What was sent is read back and checked before ``write`` returns. S3 is sent
part by part from the blobs as they lie; other file systems are given the pack as one piece of memory.
"""

from __future__ import annotations

import posixpath
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec

from meristem.errors import BadInput, EnvironmentFailure, Tampered
from meristem.store.canonical import PREFIX
from meristem.store.files import write_at
from meristem.store.pack_format import (
    Blob,
    Layout,
    Location,
    header_length,
    is_pack_name,
    layout,
    pack_entries,
)
from meristem.store.packs import OWNER, Packs, Progress
from meristem.store.threads import spread

PART = 16 << 20  # bytes of one part of a large upload; four are under way at once
_MOST_PARTS = 10_000
_RANGE = 8 << 20  # bytes of one download; neighbours are fetched together up to this
_ROUND = 32 << 20  # bytes asked for at once; two rounds are under way
_FIRST = 1 << 16  # most headers fit into this
_SUFFIX = ".safetensors"
_LEFTOVER = re.compile(r"([0-9a-f]{64})\.safetensors\?uploadId=(.+)")
_DRIVERS = {"s3": "'meristem[s3]'", "s3a": "'meristem[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
_NETWORK = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "azure", "asyncio")


class ObjectPacks(Packs):
    def __init__(self, url: str):
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        self._is_s3 = scheme in ("s3", "s3a")
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **_options(self._is_s3))
        except ImportError as error:
            driver = _DRIVERS.get(scheme, f"the fsspec driver for {scheme}://")
            raise EnvironmentFailure(f"{url}: no driver for {scheme}://; pip install {driver}") from error
        except ValueError as error:
            raise BadInput(
                f"{url}: {_line(error)}; give a folder or a URL such as s3://bucket/prefix"
            ) from error
        self.fs: Any = fs
        self.root = root.rstrip("/")

    def path(self, pack: str) -> str:
        return f"{self.root}/{pack.removeprefix(PREFIX)}{_SUFFIX}"

    def write(
        self, blobs: Iterable[Blob], progress: Progress | None = None, salt: str = ""
    ) -> list[Location]:
        plan = layout(blobs, salt)
        if not plan.blobs:
            return []
        # The same pack may be there already, and others may refer to it: a sound one is left alone.
        if not self._holds(plan):
            self._send(plan, progress)
            if not self._holds(plan):
                if salt:  # else the name may be another writer's too, who read it back well
                    self.remove(plan.pack)
                raise EnvironmentFailure(
                    f"{self._label(plan.pack)}: what was read back is not what was sent; "
                    "check the network and repeat the command"
                )
        return plan.locations

    def check(self, location: Location) -> None:
        for _ in self._pieces([location]):
            pass

    def views(self, locations: Iterable[Location]) -> Iterator[tuple[Location, memoryview]]:
        whole = None
        for location, at, piece in self._pieces(locations):
            if len(piece) == location.length:
                yield location, piece
                continue
            if at == 0:
                whole = memoryview(bytearray(location.length))
            assert whole is not None
            whole[at : at + len(piece)] = piece
            if at + len(piece) == location.length:
                yield location, whole.toreadonly()

    def copy(
        self, places: Iterable[tuple[Location, int]], target: int, progress: Progress | None = None
    ) -> None:
        # In the order of the pack, so that neighbours are fetched together.
        places = sorted(places, key=lambda place: (place[0].pack, place[0].offset))
        done, total = 0, sum(location.length for location, _ in places)
        starts = iter(start for _, start in places)
        start = 0
        for _, at, piece in self._pieces(location for location, _ in places):
            start = next(starts) if at == 0 else start
            write_at(target, piece, start + at)
            done += len(piece)
            if progress:
                progress(done, total)

    def entries(self, pack: str) -> Iterator[Location]:
        if (size := self.size(pack)) < 8:  # nothing cannot be asked for
            raise Tampered(f"{self._label(pack)}: the pack is cut short")
        (first,) = self._ranges([(pack, 0, min(size, _FIRST))])
        try:
            length = header_length(first[:8], size)
            if length > len(first):
                (rest,) = self._ranges([(pack, len(first), length)])
                first += rest
            yield from pack_entries(pack, first[:length], size)
        except ValueError as error:
            raise Tampered(f"{self._label(pack)}: {error}") from error

    def names(self) -> Iterator[str]:
        with self._told():
            try:
                paths = self.fs.ls(self.root, detail=False)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                paths = []
        names = (posixpath.basename(path) for path in paths)
        packs = (PREFIX + name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        yield from sorted(filter(is_pack_name, packs))

    def size(self, pack: str) -> int:
        with self._told(pack):
            return int(self.fs.size(self.path(pack)))

    def remove(self, pack: str) -> None:
        with self._told():
            try:
                self.fs.rm_file(self.path(pack))
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise

    @property
    def place(self) -> str:
        return self.url

    def owner(self) -> str | None:
        with self._told():
            try:
                body: bytes = self.fs.cat_file(f"{self.root}/{OWNER}")
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return None
        return body.decode("ascii", "replace").strip()

    def claim(self, store: str) -> None:
        with self._told():
            self.fs.pipe_file(f"{self.root}/{OWNER}", f"{store}\n".encode())

    def leftovers(self) -> Iterator[tuple[str, float]]:
        """Uploads in parts that nobody finished; they take room and are listed nowhere else."""
        now = time.time()
        for upload in self._uploads():
            folder, name = posixpath.split(upload["Key"])
            if folder == self.root.partition("/")[2]:
                yield f"{name}?uploadId={upload['UploadId']}", max(0.0, now - upload["Initiated"].timestamp())

    def becomes(self, leftover: str, pack: str) -> bool:
        found = _LEFTOVER.fullmatch(leftover)
        return found is not None and pack == PREFIX + found[1]

    def discard(self, leftover: str) -> None:
        if not (found := _LEFTOVER.fullmatch(leftover)):
            raise ValueError(f"'{leftover}' is no unfinished upload of a pack")
        if self._is_s3:
            bucket, _, prefix = self.root.partition("/")
            key = posixpath.join(prefix, leftover.partition("?")[0])
            with self._told():
                try:
                    self.fs.abort_mpu(bucket, key, found[2])
                except FileNotFoundError as error:
                    if _no_bucket(error):
                        raise

    def _uploads(self) -> list[dict[str, Any]]:
        if not self._is_s3:
            return []
        with self._told():
            try:
                found: list[dict[str, Any]] = self.fs.list_multipart_uploads(self.root.partition("/")[0])
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return []  # some servers call no upload a missing one
        return found

    def _send(self, plan: Layout, progress: Progress | None) -> None:
        sending = _Sending(plan)
        part = max(PART, -(-plan.size // _MOST_PARTS))
        body: Any = sending
        options = {"chunksize": part, "max_concurrency": 4} if self._is_s3 else {}
        if not self._is_s3 or plan.size < 2 * part:
            body = sending[0 : plan.size]
        with self._told(), ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.fs.pipe_file, self.path(plan.pack), body, **options)
            try:
                while not wait([sent], 0.2).done:
                    sending.report(progress)
                sent.result()
                sending.report(progress)
            except BaseException:
                sending.stopped = True  # the upload fails at its next part and is taken back
                raise

    def _holds(self, plan: Layout) -> bool:
        """Whether the whole pack is there, every byte of it read and checked."""
        try:
            (header,) = self._ranges([(plan.pack, 0, len(plan.header))])
            if header != plan.header or self.size(plan.pack) != plan.size:
                return False
            for _ in self._pieces(plan.locations):
                pass
        except Tampered:
            return False
        return True

    def _pieces(self, locations: Iterable[Location]) -> Iterator[tuple[Location, int, memoryview]]:
        """The bytes of each location in order, as ``(location, position in it, piece)``.

        The last piece of a location comes only when all of it was checked. Few rounds are in memory at once.
        """
        missing, running = 0, None
        for found in spread(self._fetch, _rounds(locations), ahead=1):
            for location, at, piece in found:
                if at == 0:
                    missing, running = location.length, location.hash()
                assert running is not None
                running.update(piece)
                missing -= len(piece)
                if not missing and PREFIX + running.hexdigest() != location.digest:
                    raise Tampered(
                        f"pack {location.pack[7:19]}...: the bytes of {location.digest} do not match their digest"
                    )
                yield location, at, piece

    def _fetch(self, wanted: list[_Piece]) -> list[tuple[Location, int, memoryview]]:
        """One round: neighbours in one request, all requests at once."""
        ranges = _joined(wanted)
        bodies = [memoryview(body) for body in self._ranges(ranges)]
        for pack in {piece.location.pack for piece in wanted if not piece.length}:
            self.size(pack)  # an empty range cannot be asked for; its pack must be there all the same
        found = []
        for piece in wanted:
            part = memoryview(b"")
            if piece.length:
                holder = bisect_right(ranges, (piece.location.pack, piece.start, sys.maxsize)) - 1
                start = piece.start - ranges[holder][1]
                part = bodies[holder][start : start + piece.length]
            found.append((piece.location, piece.at, part))
        return found

    def _ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """The bytes from ``start`` to ``end`` of packs; all of them, or ``Tampered``."""
        if not ranges:
            return []
        paths = [self.path(pack) for pack, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [end for _, _, end in ranges]
        with self._told():
            bodies: list[bytes] = self.fs.cat_ranges(paths, starts, ends, on_error="return")
        for (pack, start, end), body in zip(ranges, bodies, strict=True):
            with self._told(pack):
                if isinstance(body, Exception):
                    if isinstance(body, OSError) and not isinstance(body, FileNotFoundError):
                        self._refuse_short(pack, end)  # how a server answers to a range beyond the end
                    raise body
            if len(body) != end - start:
                raise Tampered(f"{self._label(pack)}: the pack is cut short")
        return bodies

    def _refuse_short(self, pack: str, end: int) -> None:
        if self.size(pack) < end:
            raise Tampered(f"{self._label(pack)}: the pack is cut short")

    def _label(self, pack: str) -> str:
        return f"{self.url}/{pack.removeprefix(PREFIX)}{_SUFFIX}"

    @contextmanager
    def _told(self, pack: str | None = None) -> Iterator[None]:
        """Translate what a driver raises; a file that is missing is ``pack``."""
        try:
            yield
        except FileNotFoundError as error:
            if pack is not None and not _no_bucket(error):
                raise Tampered(f"{self._label(pack)}: the pack is missing") from error
            raise EnvironmentFailure(
                f"{self.url}: {_line(error)}; make the bucket, or mend `packs` in meristem.yaml"
            ) from error
        except Exception as error:
            known = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK
            if not known and not str(error).startswith("Invalid endpoint"):
                raise
            raise EnvironmentFailure(f"{self.url}: {_line(error)}; {_remedy(error)}") from error


def _options(is_s3: bool) -> dict[str, Any]:
    # A listing that is remembered would hide the packs that others write.
    options: dict[str, Any] = {"use_listings_cache": False}
    if is_s3:
        # Every entry is checked by SHA-256 here; and some servers send the whole object's checksum with a range.
        options["config_kwargs"] = {
            "response_checksum_validation": "when_required",
            # s3fs repeats five times whatever these give up on: nobody should wait minutes for a wrong address.
            "retries": {"mode": "standard", "total_max_attempts": 2},
            "connect_timeout": 5,
        }
    return options


@dataclass(frozen=True)
class _Piece:
    """``length`` bytes of ``location`` from its position ``at`` on."""

    location: Location
    at: int
    length: int

    @property
    def start(self) -> int:
        return self.location.offset + self.at


class _Sending:
    """A pack that is not there yet, as bytes that can be measured and sliced: all that an upload in parts needs."""

    def __init__(self, plan: Layout):
        self._size = plan.size
        self._parts = [(0, memoryview(plan.header))]
        for blob, location in zip(plan.blobs, plan.locations, strict=True):
            self._parts.append((location.offset, memoryview(blob.data).cast("B")))
        self._payload = plan.size - len(plan.header)
        self._sent = self._told = 0
        self.stopped = False

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> bytes:
        if self.stopped:
            raise OSError("the upload was broken off")
        start, end, _ = wanted.indices(self._size)
        self._sent = max(self._sent, end)
        return b"".join(
            part[max(0, start - at) : max(0, end - at)]
            for at, part in self._parts
            if at < end and start < at + len(part)
        )

    def report(self, progress: Progress | None) -> None:
        """Tell how many bytes of the blobs are on their way, if that is news."""
        done = max(0, self._sent - (self._size - self._payload))
        if progress and done and done > self._told:
            self._told = done
            progress(done, self._payload)


def _rounds(locations: Iterable[Location]) -> Iterator[list[_Piece]]:
    """Pieces of each location in order, no longer than a range, and as many as one round may hold."""
    pieces: list[_Piece] = []
    size = 0
    for location in locations:
        for at in range(0, max(location.length, 1), _RANGE):
            piece = _Piece(location, at, min(_RANGE, location.length - at))
            if pieces and size + piece.length > _ROUND:
                yield pieces
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.length
    if pieces:
        yield pieces


def _joined(pieces: Iterable[_Piece]) -> list[tuple[str, int, int]]:
    """``(pack, start, end)`` of as few ranges as cover ``pieces``, none longer than a range may be."""
    ranges: list[tuple[str, int, int]] = []
    for pack, start, end in sorted(
        {(p.location.pack, p.start, p.start + p.length) for p in pieces if p.length}
    ):
        if ranges and ranges[-1][0] == pack and start <= ranges[-1][2] and end - ranges[-1][1] <= _RANGE:
            ranges[-1] = (pack, ranges[-1][1], max(end, ranges[-1][2]))
        else:
            ranges.append((pack, start, end))
    return ranges


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_bucket(error: BaseException) -> bool:
    codes = (getattr(cause, "response", None) for cause in _causes(error))
    return any(isinstance(code, dict) and code["Error"].get("Code") == "NoSuchBucket" for code in codes)


def _remedy(error: BaseException) -> str:
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and what they may do"
    return "check the network and AWS_ENDPOINT_URL, then repeat the command"
