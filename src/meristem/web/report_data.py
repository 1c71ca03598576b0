"""Everything the report reads, taken from a ``Workspace`` once. Nothing is computed anew or written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from meristem.config import Recipe
from meristem.ecosystem.aliases import CHAMPION, Alias
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.audit import Audit
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Decision, Model, Release
from meristem.ecosystem.versions import VersionEntry
from meristem.evaluation.service import EvaluationEntry
from meristem.store.evidence import Event
from meristem.workspace import DecisionResult, UpdateResult, Workspace


@dataclass(frozen=True)
class Snapshot:
    """One model and its family (the tree that it grows on) as the workspace holds them now."""

    ws: Workspace
    model: Model
    family: list[Model]  # bases before those that stand on them
    versions: dict[str, VersionEntry]  # the family's, by digest
    aliases: list[Alias]  # the family's
    suites: list[AssetEntry]
    evaluations: list[EvaluationEntry]  # in the order they were recorded
    decisions: list[DecisionResult]  # of the model, oldest first
    family_decisions: list[Entry]
    releases: list[Entry]  # the family's, oldest first
    updates: list[UpdateResult]
    events: list[Event]
    audit: Audit

    @cached_property
    def champions(self) -> dict[str, str]:
        """Model name -> digest of its champion."""
        return {alias.model: alias.version for alias in self.aliases if alias.name == CHAMPION}

    @property
    def champion(self) -> VersionEntry | None:
        digest = self.champions.get(self.model.name)
        return self.versions[digest] if digest else None

    @property
    def own_versions(self) -> list[VersionEntry]:
        return self.versions_of(self.model.name)

    @property
    def own_releases(self) -> list[Entry]:
        return [entry for entry in self.releases if entry.model == self.model.name]

    def versions_of(self, model: str) -> list[VersionEntry]:
        return sorted((v for v in self.versions.values() if v.model == model), key=lambda v: v.number)

    def label(self, digest: str) -> str:
        found = self.versions.get(digest)
        return found.label if found else short(digest)

    @cached_property
    def times(self) -> dict[tuple[str, str], Event]:
        """``(kind, subject)`` -> the newest event of that kind about that subject."""
        return {(event.kind, event.subject): event for event in self.events}

    @cached_property
    def asset_labels(self) -> dict[str, str]:
        entries = [*self.suites, *self.ws.data()]
        return {entry.digest: entry.label for entry in entries}

    def methods(self, recipe: str | None) -> list[str]:
        """The methods of a stored recipe with their arguments: ``ewc (strength 50)``."""
        if recipe is None:
            return []
        found = Recipe.from_document(self.ws.store.document(recipe)).methods
        return [
            m.name + (f" ({', '.join(f'{k} {v}' for k, v in m.arguments.items())})" if m.arguments else "")
            for m in found
        ]


def snapshot(ws: Workspace, model: str) -> Snapshot:
    """Raises ``BadInput`` for an unknown model."""
    own = ws.versions(model)
    models = {entry.name: entry for entry in ws.models()}
    family = _family(models, model)
    names = {entry.name for entry in family}
    versions = own + [v for name in sorted(names - {model}) for v in ws.versions(name)]
    events = list(ws.events())
    recorded = {event.subject: event.sequence for event in events if event.kind == "evaluation.recorded"}
    return Snapshot(
        ws=ws,
        model=models[model],
        family=family,
        versions={version.digest: version for version in versions},
        aliases=[alias for name in sorted(names) for alias in ws.aliases(name)],
        suites=ws.suites(),
        evaluations=sorted(ws.evaluations(), key=lambda e: (recorded.get(e.digest, 0), e.digest)),
        decisions=[ws.explain(entry.id) for entry in ws.records("decision", model)],
        family_decisions=[entry for entry in ws.records("decision") if entry.model in names],
        releases=[entry for entry in ws.records("release") if entry.model in names],
        updates=[ws.update_result(entry.id) for entry in ws.records("update", model)],
        events=events,
        audit=ws.verify(),
    )


def _family(models: dict[str, Model], name: str) -> list[Model]:
    """The models of the tree that ``name`` belongs to, in the order of ``models``."""

    def root(model: Model) -> str:
        while model.base:
            model = models[model.base]
        return model.name

    return [model for model in models.values() if root(model) == root(models[name])]


@dataclass(frozen=True)
class Standing:
    """Where a version stands, as a key, a symbol and words."""

    key: str
    symbol: str
    words: str


CHAMPION_NOW = Standing("champion", "★", "champion")
_STANDINGS = {
    "rolled-back": Standing("rolled-back", "↩", "rolled back"),
    "former": Standing("former", "●", "earlier champion"),
    "fail": Standing("blocked", "✕", "blocked: failed"),
    "inconclusive": Standing("unproven", "?", "blocked: unproven"),
    "pass": Standing("passed", "✓", "passed, not released"),
    "new": Standing("new", "○", "not judged yet"),
}


def standing(data: Snapshot, version: VersionEntry) -> Standing:
    """The latest thing that happened to a version."""
    if data.champions.get(version.model) == version.digest:
        return CHAMPION_NOW
    releases = [entry.as_(Release) for entry in data.releases if entry.model == version.model]
    touching = [r for r in releases if version.digest in (r.version, r.previous)]
    if touching:
        last = touching[-1]
        undone = last.kind == "rollback" and last.previous == version.digest
        return _STANDINGS["rolled-back" if undone else "former"]
    outcomes = [
        entry.as_(Decision).outcome
        for entry in data.family_decisions
        if entry.as_(Decision).version == version.digest
    ]
    return _STANDINGS[outcomes[-1] if outcomes else "new"]


def short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
