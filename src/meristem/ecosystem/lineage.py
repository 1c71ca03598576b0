"""What changed between two versions."""

from __future__ import annotations

from typing import Any

from meristem.ecosystem import versions
from meristem.ecosystem.versions import VersionEntry
from meristem.store.store import Store


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
