"""Where a bundle lies: a folder, or a prefix of any fsspec file system."""

from __future__ import annotations

import errno
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from meristem.ecosystem.bundles.form import PACKS
from meristem.errors import BadInput, EnvironmentFailure, Tampered
from meristem.store.files import discard, disk_failure, make_folder, sync_folder
from meristem.store.packs import Packs, packs_at

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}

T = TypeVar("T")


class Place(ABC):
    """Names are relative (``bundle.json``, ``packs/....safetensors``). Every method raises ``EnvironmentFailure`` when
    the disk or the network refuses."""

    label: str
    packs: Packs

    @abstractmethod
    def names(self) -> list[str]:
        """Every file there is, temporaries of a local writer aside; nothing when the place is not there."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a file, None when it is not there. Raises ``Tampered`` beyond ``limit`` bytes."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, whole or not at all; False when there is one already, which is left alone."""


class Folder(Place):
    def __init__(self, root: Path):
        self.root, self.label = root, str(root)
        self.packs = packs_at(root / PACKS)

    def names(self) -> list[str]:
        try:
            return sorted(self._walk())
        except NotADirectoryError as error:
            raise BadInput(f"{self.root}: this is a file; give a folder") from error
        except OSError as error:
            raise disk_failure(error, self.root) from error

    def _walk(self) -> Iterator[str]:
        if not self.root.exists():
            return
        for path in self.root.iterdir():
            if path.name == PACKS and path.is_dir():
                yield from (f"{PACKS}/{inner.name}" for inner in path.iterdir() if not _temporary(inner.name))
            elif not _temporary(path.name):
                yield path.name

    def read(self, name: str, limit: int) -> bytes | None:
        path = self.root / name
        try:
            with path.open("rb") as file:
                body = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise disk_failure(error, path) from error
        return _limited(body, limit, str(path))

    def create(self, name: str, data: bytes) -> bool:
        path = self.root / name
        temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            make_folder(path.parent)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            made = _put_in_place(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise disk_failure(error, path) from error
        finally:
            discard(temporary)
        return made


class Prefix(Place):
    def __init__(self, url: str):
        from meristem.store.object_packs import ObjectPacks

        self.label = url.rstrip("/")
        packs = ObjectPacks(f"{self.label}/{PACKS}")
        self.packs, self._fs = packs, packs.fs
        self._root = packs.root.removesuffix(f"/{PACKS}")

    def names(self) -> list[str]:
        found: list[str] = self._asked(lambda: self._fs.find(self._root)) or []
        start = len(self._root.strip("/")) + 1
        return sorted(path.strip("/")[start:] for path in found if path.strip("/")[start:])

    def read(self, name: str, limit: int) -> bytes | None:
        path = f"{self._root}/{name}"
        size = self._asked(lambda: self._fs.size(path))
        if size is None:
            return None
        _limited(b"", limit, f"{self.label}/{name}", int(size))
        body = self._asked(lambda: bytes(self._fs.cat_file(path)))
        return None if body is None else _limited(body, limit, f"{self.label}/{name}")

    def create(self, name: str, data: bytes) -> bool:
        path = f"{self._root}/{name}"
        if self._asked(lambda: self._fs.size(path)) is not None:
            return False
        # Where the server knows conditions (S3 does), of two writers at once only one makes the object.
        options: dict[str, Any] = {"mode": "create"}
        try:
            self._asked(lambda: self._fs.pipe_file(path, data, **options), needed=True)
        except FileExistsError:
            return False
        return True

    def _asked(self, ask: Callable[[], T], *, needed: bool = False) -> T | None:
        """What the file system says; None for what is not there, unless it is ``needed`` (a bucket)."""
        try:
            return ask()
        except FileExistsError:
            raise
        except Exception as error:  # every driver has errors of its own, and nothing else runs in here
            if isinstance(error, FileNotFoundError) and not needed:
                return None
            told = " ".join(str(error).split()) or type(error).__name__
            raise EnvironmentFailure(
                f"{self.label}: {told}; check the network, the bucket and the credentials, then repeat the command"
            ) from error


def place_at(where: str | Path) -> Place:
    """The place that a path or a URL names. Raises ``BadInput`` or ``EnvironmentFailure`` as ``packs_at`` does."""
    if isinstance(where, Path) or "://" not in where:
        return Folder(Path(where))
    if (url := urlsplit(where)).scheme == "file":
        return Folder(Path(unquote(url.path)))
    return Prefix(where)


def _temporary(name: str) -> bool:
    return name.startswith(".tmp-")


def _put_in_place(temporary: Path, path: Path) -> bool:
    """Give ``temporary`` its name, unless there is a file of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        temporary.replace(path)
    return True


def _limited(body: bytes, limit: int, where: str, size: int = 0) -> bytes:
    if max(size, len(body)) > limit:
        raise Tampered(f"{where}: larger than the {limit >> 20} MiB that such a file of a bundle may take")
    return body
