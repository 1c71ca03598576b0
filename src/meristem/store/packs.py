"""``Packs``: immutable, content-addressed containers of tensors and files, wherever they lie.

The contract stands in the docstrings below and is tested, word by word, by ``meristem.testing.packs``, which
runs on every back end. What a pack looks like inside: ``pack_format``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from meristem.errors import Tampered
from meristem.store.files import disk_failure, write_file_durably
from meristem.store.pack_format import DTYPE_SIZE, Blob, Location, name_of, safetensors_entries

__all__ = [
    "DTYPE_SIZE",
    "Blob",
    "Location",
    "Packs",
    "Progress",
    "disk_failure",
    "packs_at",
    "safetensors_entries",
    "write_file_durably",
]

Progress = Callable[[int, int], None]


OWNER = "store-id"  # names the store that the packs beside it belong to


class Packs(ABC):
    """A set of packs.

    - A pack is there whole or not at all, for every reader at every moment.
    - It is never changed. Its name is the digest of its header, which names the digest of everything in it:
      no byte of it can change unnoticed.
    - Nothing is known about who refers to a pack. Whoever removes one makes sure that nobody does.
    - Processes and threads may call anything at the same time. Two that write the same blobs under the same salt
      write the same pack, and both succeed.
    - Whoever may remove packs beside writers has these give a salt that nobody else ever gives. No name is used twice
      then: a removal that was held up, or whose request arrives late, takes nothing that came after.

    Every method raises ``EnvironmentFailure``, in one line with a remedy, when the disk or the network refuses
    (full, read-only, no permission, no such bucket, no connection, I/O error), and ``Tampered`` when bytes are
    gone or are not what their digest says.
    """

    @abstractmethod
    def write(
        self, blobs: Iterable[Blob], progress: Progress | None = None, salt: str = ""
    ) -> list[Location]:
        """Store ``blobs`` as one new pack and return where each lies, each distinct blob once.

        The name follows from the blobs and ``salt``, which stands in the header.
        On return the pack is durable and visible, and has been read back and checked. No blobs: nothing is
        written. When it raises (also out of ``progress(done, total)``, which counts bytes and may be called
        from another thread), nobody can see a part of the pack: at worst a temporary is left (``leftovers``),
        or a whole pack that nobody refers to.
        """

    def name_of(self, entries: Iterable[Blob | Location], salt: str = "") -> str:
        """The name that ``write`` gives the pack of ``entries``, known before it is written."""
        return name_of(entries, salt)

    def read(self, location: Location) -> bytes:
        """The bytes at ``location``, checked."""
        ((_, view),) = self.views([location])
        return bytes(view)

    def intact(self, location: Location) -> bool:
        """Whether the bytes of ``location`` are there and match their digest, in bounded memory."""
        try:
            self.check(location)
        except Tampered:
            return False
        return True

    @abstractmethod
    def check(self, location: Location) -> None:
        """Raise ``Tampered`` unless ``location`` is ``intact``; says whether it is gone, cut short or changed."""

    @abstractmethod
    def views(self, locations: Iterable[Location]) -> Iterator[tuple[Location, memoryview]]:
        """The checked bytes of each location, in the order asked, without holding all of them in memory.

        A view stays valid for as long as somebody holds it. It may be a mapped file: should the disk fail, or
        somebody cut the file short, between the check and the use, the system ends the process (SIGBUS). ``read`` and
        ``copy`` raise instead.
        """

    @abstractmethod
    def copy(
        self, places: Iterable[tuple[Location, int]], target: int, progress: Progress | None = None
    ) -> None:
        """Write the bytes of each location at its given offset of the open file ``target`` (a descriptor).

        The bytes written are the very bytes that were hashed. After ``Tampered`` the target is worthless. An
        ``OSError`` of the target itself is not translated.
        """

    @abstractmethod
    def entries(self, pack: str) -> Iterator[Location]:
        """Every entry of one pack, from its header alone.

        Raises ``Tampered`` unless the header is the one that names the pack and the pack has the size that
        the header says.
        """

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The name of every pack that is there at this moment, sorted; temporaries are none."""

    def headers(self) -> Iterator[Location]:
        """Every entry of every pack, from the packs alone (to rebuild or check the database's index)."""
        for pack in self.names():
            yield from self.entries(pack)

    @abstractmethod
    def size(self, pack: str) -> int:
        """How many bytes the pack takes. Raises ``Tampered`` when it is not there."""

    @abstractmethod
    def remove(self, pack: str) -> None:
        """Take the pack away, durably. One that is not there is gone already: nothing happens."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the packs are, for people; holds no password."""

    @abstractmethod
    def owner(self) -> str | None:
        """The id of the store whose packs these are, as ``claim`` wrote it; None where nobody did."""

    @abstractmethod
    def claim(self, store: str) -> None:
        """Write down durably that these are the packs of ``store``."""

    @abstractmethod
    def leftovers(self) -> Iterator[tuple[str, float]]:
        """The unfinished temporaries of writers, dead or alive, with the seconds since each was last touched."""

    @abstractmethod
    def becomes(self, leftover: str, pack: str) -> bool:
        """Whether ``leftover`` was to become ``pack``, as its name says."""

    @abstractmethod
    def discard(self, leftover: str) -> None:
        """Take one of ``leftovers`` away; gone already is fine. ``ValueError`` for any other name."""


def packs_at(where: str | Path) -> Packs:
    """The packs in a local folder (a path or ``file://``) or under any other fsspec URL (``s3://bucket/prefix``).

    Raises ``EnvironmentFailure`` when the driver for the URL is not installed, ``BadInput`` when there is none.
    """
    # The back ends stand on this module; and a local store should not pay for importing fsspec.
    from meristem.store.local_packs import LocalPacks

    if isinstance(where, Path) or "://" not in where:
        return LocalPacks(Path(where))
    if (url := urlsplit(where)).scheme == "file":
        return LocalPacks(Path(unquote(url.path)))
    from meristem.store.object_packs import ObjectPacks

    return ObjectPacks(where)
