"""Checkouts: a version as a plain folder, for users and for the engine's cache."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from meristem.ecosystem import expert_folders, folders, versions
from meristem.ecosystem.folders import Progress
from meristem.ecosystem.records import Content
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.store.canonical import PREFIX
from meristem.store.packs import disk_failure
from meristem.store.store import Store

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Checkout:
    """``folder`` loads as it is; for an adapter or experts ``base_folder`` holds the weights that they sit on.

    ``experts``: names of the folders inside that hold one expert each, as a plain PEFT adapter. ``meristem_alone``: why
    there are none, of experts that no such adapter is equal to.
    """

    folder: Path
    base_folder: Path | None
    experts: tuple[str, ...] = ()
    meristem_alone: str = ""


NO_ADAPTER = (
    "experts that no PEFT adapter is equal to, their gates look at each token: Meristem's own engine serves them; "
    "methods.architecture.moe_cl distils adapters that come near"
)


def cached(store: Store, content_digest: str, progress: Progress | None = None) -> Checkout:
    """The engine's copy of a content, made on first use and checked against its digests every time."""
    content = _content(store, content_digest)
    base = cached(store, content.base, progress).folder.absolute() if content.base else None
    folder = store.root / "cache" / content_digest.removeprefix(PREFIX)[:24]
    if not (folder.exists() and folders.matches(content, folder, base)):
        _replace(store, content, folder, base, progress)
    return Checkout(folder, base)


def export(store: Store, version: VersionEntry, folder: Path, progress: Progress | None = None) -> Checkout:
    """Write a version to ``folder`` for use outside Meristem; an adapter gets its base in ``folder/base``.

    An adapter without a tokenizer of its own gets its base's beside it, as ``save_pretrained`` leaves it. Experts are
    written as Meristem loads them, and each once more as a PEFT adapter in a folder of its own where there is an equal one;
    where there is none, ``meristem.json`` and ``Checkout.meristem_alone`` say so.

    ``folder/meristem.json`` says which version it is. Raises ``BadInput`` when ``folder`` is not empty.
    """
    folder = folder.resolve()
    _check_new(folder)
    content = _content(store, version.content)
    base = folder / "base" if content.base else None
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if content.base:
            folders.checkout(store, _content(store, content.base), temporary / "base", progress=progress)
        folders.checkout(store, content, temporary, base_folder=base, progress=progress)
        experts: list[str] = []
        if content.kind == "experts" and base is not None:
            experts = expert_folders.checkout(store, content, temporary, base)
        if content.base:
            _add_tokenizer(temporary / "base", temporary)
        about = {
            "version": version.label,
            "digest": version.digest,
            "content": version.content,
            "base": content.base,
        }
        alone = NO_ADAPTER if content.kind == "experts" and not experts else ""
        if alone:
            about["peft"] = alone
        (temporary / "meristem.json").write_text(json.dumps(about, indent=2) + "\n")
        temporary.rename(folder)  # takes the place of an empty folder, and of nothing else
    except OSError as error:
        raise disk_failure(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkout(folder, base, tuple(experts), alone)


def _add_tokenizer(base: Path, folder: Path) -> None:
    if not (folder / "tokenizer_config.json").exists():
        for pattern in _TOKENIZER_FILES:
            for path in base.glob(pattern):
                shutil.copy(path, folder / path.name)


def _check_new(folder: Path) -> None:
    try:
        if folder.exists() and any(folder.iterdir()):
            raise BadInput(f"{folder}: the folder is not empty; give a new one")
    except NotADirectoryError as error:
        raise BadInput(f"{folder}: this is a file; give a new folder") from error
    except OSError as error:
        raise disk_failure(error, folder) from error


def _content(store: Store, digest: str) -> Content:
    with store.database.read() as connection:
        versions.refuse_given_up(connection, digest)
        return versions.content_of(connection, digest)


def _replace(
    store: Store, content: Content, folder: Path, base: Path | None, progress: Progress | None
) -> None:
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    damaged = temporary.with_name(f"{temporary.name}-damaged")
    try:
        folders.checkout(store, content, temporary, base_folder=base, progress=progress)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(damaged)
        temporary.rename(folder)
    except OSError as error:
        if folders.matches(content, folder, base):  # another process made it first
            return
        raise disk_failure(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
