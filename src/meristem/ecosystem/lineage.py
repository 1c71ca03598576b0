"""What changed between two versions, and what a version learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from meristem.ecosystem import versions
from meristem.ecosystem.versions import VersionEntry
from meristem.store.store import Store


@dataclass(frozen=True)
class Learned:
    """What a version and all that it grew from were trained on.

    ``data``: digests of data sets, oldest first, each once. ``unrecorded``: labels of the versions whose weights came
    ready made (a foundation model, a commit from a folder), so that nobody here knows their training data.
    """

    data: tuple[str, ...]
    unrecorded: tuple[str, ...]


def learned(connection: Connection, version: VersionEntry) -> Learned:
    """Over the version, its parents, their pinned bases, and so on down to the foundation."""
    queue, found = [version.digest], dict[str, VersionEntry]()
    while queue:
        digest = queue.pop(0)
        if digest not in found:
            found[digest] = entry = versions.by_digest(connection, digest)
            queue += _below(entry)
    oldest_first = list(reversed(found.values()))
    return Learned(
        data=tuple(dict.fromkeys(d for entry in oldest_first for d in entry.record.data)),
        unrecorded=tuple(entry.label for entry in oldest_first if _ready_made(entry, found)),
    )


def _below(entry: VersionEntry) -> list[str]:
    return [*entry.record.parents, *filter(None, [entry.record.base])]


def _ready_made(entry: VersionEntry, known: dict[str, VersionEntry]) -> bool:
    """Whether nothing says what its weights were made from: no data, and not just what lies below as it is."""
    below = [known[digest].content for digest in _below(entry)]
    return not entry.record.data and entry.content not in below


def difference(store: Store, first: VersionEntry, second: VersionEntry) -> dict[str, Any]:
    """Names of tensors and files that were added, removed or changed, and what the manifests say differently."""
    with store.database.read() as connection:
        old = versions.content_of(connection, first.content)
        new = versions.content_of(connection, second.content)
    return {
        "first": first.label,
        "second": second.label,
        "same content": first.content == second.content,
        "tensors": _changes(old.tensors, new.tensors),
        "files": _changes(old.files, new.files),
        "tasks added": sorted(set(second.record.tasks) - set(first.record.tasks)),
        "data added": sorted(set(second.record.data) - set(first.record.data)),
        "recipe": [first.record.recipe, second.record.recipe],
        "code": _changes(first.record.code, second.record.code),
    }


def _changes(old: dict[str, str], new: dict[str, str]) -> dict[str, Any]:
    return {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "changed": sum(old[name] != new[name] for name in old.keys() & new.keys()),
        "same": sum(old[name] == new[name] for name in old.keys() & new.keys()),
    }
