"""Which gates apply to which suites: the policy spelled out for one update."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from meristem.config import ModelSettings
from meristem.ecosystem import assets, versions
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset, Criterion
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.release import gates
from meristem.store.store import read_document

_ALWAYS_KEPT = {"general", "instruction", "safety"}


def spelled_out(
    settings: ModelSettings, suites: Iterable[AssetEntry], new: set[str], old: set[str]
) -> list[Criterion]:
    """Every (gate, suite, arguments) of the policy for an update that teaches ``new`` on top of ``old`` tasks.

    ``new`` suites test a task that this update teaches first; ``learned`` ones a task taught before, and every
    suite of kind general, instruction or safety; a suite can be both. Raises ``BadInput`` for a suite or gate that does not exist.
    """
    newest = {entry.name: entry for entry in suites}
    taught = {name for name, e in newest.items() if _tasks(e) & (new - old)}
    learned = {
        name for name, e in newest.items() if _tasks(e) & old or set(e.record.facts["kinds"]) & _ALWAYS_KEPT
    }
    groups = {"new": taught, "learned": learned, "all": set(newest)}
    criteria = []
    for gate in settings.gates:
        gates.build(gate.gate, gate.arguments)
        names = groups[gate.suites] if isinstance(gate.suites, str) else set(gate.suites)
        for name in sorted(names):
            if name not in newest:
                raise BadInput(f"meristem.yaml: gate {gate.gate} names the unknown suite '{name}'")
            criteria.append(Criterion(gate=gate.gate, suite=name, arguments=gate.arguments))
    return criteria


def for_version(connection: Connection, settings: ModelSettings, version: VersionEntry) -> list[Criterion]:
    """The criteria of a version that no plan announced: judged by the tasks that its data taught."""
    new = {
        task
        for digest in version.record.data
        for task in Asset.from_document(read_document(connection, digest)).facts["tasks"]
    }
    old = set().union(*(versions.by_digest(connection, p).record.tasks for p in version.record.parents))
    return spelled_out(settings, newest_suites(connection), new, old)


def newest_suites(connection: Connection) -> list[AssetEntry]:
    """The newest version of every suite."""
    return list({entry.name: entry for entry in assets.listed(connection, ["suite"])}.values())


def _tasks(suite: AssetEntry) -> set[str]:
    return set(suite.record.facts["tasks"])
