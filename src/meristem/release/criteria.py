"""Which gates apply to which suites: the policy spelled out for one update."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from meristem.config import ModelSettings
from meristem.ecosystem import assets, versions
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset, Criterion, Plan
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
    suite of kind general, instruction or safety; a suite can be both. A gate passes over suites of scores that it does
    not judge, unless it names them. Raises ``BadInput`` for a suite or gate that
    does not exist, and for a task that a gate asks about and no suite tests: absent evidence never passes.
    """
    newest = {entry.name: entry for entry in suites}
    tested = set().union(*map(_tasks, newest.values()))
    untested = {"new": new - old - tested, "learned": old - tested}
    taught = {name for name, e in newest.items() if _tasks(e) & (new - old)}
    learned = {
        name for name, e in newest.items() if _tasks(e) & old or set(e.record.facts["kinds"]) & _ALWAYS_KEPT
    }
    groups = {"new": taught, "learned": learned, "all": set(newest)}
    criteria = []
    for gate in settings.gates:
        built = gates.build(gate.gate, gate.arguments)
        if isinstance(gate.suites, str) and (lacking := untested.get(gate.suites)):
            raise BadInput(
                f"gate {gate.gate} asks about every {gate.suites} task, and no suite tests {_listed(lacking)}: "
                f"add a suite with a task named {_listed(lacking)} (`meristem suite add`)"
            )
        if isinstance(gate.suites, str):
            names = {name for name in groups[gate.suites] if built.fits(newest[name])}
        else:
            names = set(gate.suites)
        for name in sorted(names):
            if name not in newest:
                raise BadInput(f"meristem.yaml: gate {gate.gate} names the unknown suite '{name}'")
            built.check(newest[name])
            criteria.append(Criterion(gate=gate.gate, suite=name, arguments=gate.arguments))
    return criteria


def for_plan(
    connection: Connection, settings: ModelSettings, plan: Plan, champion: VersionEntry
) -> tuple[list[Criterion], dict[str, AssetEntry]]:
    """The criteria and suites fixed in ``plan``; on top, once the champion is another than the plan's parent,
    the same policy spelled out for what that champion learned."""
    fixed = list(plan.criteria)
    suites = {name: assets.resolve(connection, "suite", digest) for name, digest in plan.suites.items()}
    if champion.digest != plan.parent:
        suites = {entry.name: entry for entry in newest_suites(connection)} | suites
        new, old = tasks_of(connection, plan.data), set(champion.record.tasks)
        fixed += [c for c in spelled_out(settings, suites.values(), new, old) if c not in fixed]
    return fixed, suites


def for_version(
    connection: Connection, settings: ModelSettings, version: VersionEntry, champion: VersionEntry
) -> tuple[list[Criterion], dict[str, AssetEntry]]:
    """The criteria of a version that no plan announced: by the tasks that its data taught, and by those that its
    parents or the champion learned before."""
    before = [champion, *(versions.by_digest(connection, parent) for parent in version.record.parents)]
    old = {task for entry in before for task in entry.record.tasks}
    suites = newest_suites(connection)
    fixed = spelled_out(settings, suites, tasks_of(connection, version.record.data), old)
    return fixed, {entry.name: entry for entry in suites}


def compares(criterion: Criterion) -> bool:
    """Whether its gate compares two versions, and so is evidence of how good they are."""
    return gates.build(criterion.gate, criterion.arguments).compares


def policy_of(connection: Connection, plan: Plan, present: ModelSettings) -> ModelSettings:
    """The policy under which ``plan`` was made; ``present`` for a plan that names none."""
    if plan.policy is None:
        return present
    document = read_document(connection, plan.policy)
    return ModelSettings.model_validate({key: document[key] for key in ("gates", "approvals")})


def tasks_of(connection: Connection, data: Iterable[str]) -> set[str]:
    """The tasks that data sets (digests) teach."""
    found = (Asset.from_document(read_document(connection, digest)) for digest in data)
    return {task for asset in found for task in asset.facts["tasks"]}


def newest_suites(connection: Connection) -> list[AssetEntry]:
    """The newest version of every suite."""
    return list({entry.name: entry for entry in assets.listed(connection, ["suite"])}.values())


def _tasks(suite: AssetEntry) -> set[str]:
    return set(suite.record.facts["tasks"])


def _listed(tasks: set[str]) -> str:
    return " and ".join(sorted(tasks))
