"""``Registry``: the verbs about what a workspace holds: models, versions, aliases, data sets and suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.config import CONFIG_NAME, ModelSettings
from meristem.custody import Custody, check_gates
from meristem.ecosystem import aliases, assets, checkouts, models, retirement, versions
from meristem.ecosystem.aliases import Alias, Move
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset, Model
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.store.evidence import Event

if TYPE_CHECKING:
    from meristem.ecosystem.bundles import Pulled, Pushed


class Registry(Custody):
    """What a workspace holds, and the settings under which."""

    def settings(self, model: str) -> ModelSettings:
        """The policy of ``model``. Raises ``BadInput`` for a gate or a model of ``meristem.yaml`` that is not there."""
        known = {found.name for found in self.models()}
        for name in sorted(set(self.config.models) - known):
            raise BadInput(
                f"{CONFIG_NAME}: models.{name}: no such model; models here: {', '.join(sorted(known))}"
            )
        settings = self.config.for_model(model)
        check_gates(settings)
        return settings

    # Models and versions

    def add_model(
        self, name: str, *, tier: str, source: str | None = None, base: str | None = None
    ) -> VersionEntry:
        """Register a model; its first version becomes its champion. See ``ecosystem.models.add``."""
        return models.add(self.store, self.actor, name, tier, source, base, *self._transfers(name))

    def commit(self, model: str, source: str | Path, reason: str = "") -> VersionEntry:
        """Add weights made elsewhere as successor of the champion; they become the challenger."""
        return models.commit(self.store, self.actor, model, source, reason, *self._transfers(model))

    def _transfers(self, model: str) -> list[Callable[[int, int], None] | None]:
        """What tells of the bytes of ``model`` that are stored, and of those that are fetched."""
        if (report := self.progress) is None:
            return [None, None]

        def step(verb: str, done: int, total: int) -> None:
            report(f"{verb} {model}", done, total, "")

        return [partial(step, "store"), partial(step, "fetch")]

    def models(self) -> list[Model]:
        with self.store.database.read() as connection:
            return models.all_models(connection)

    def version(self, reference: str | VersionEntry) -> VersionEntry:
        """``name@v3``, ``name@champion``, ``name@sha256:...`` or ``name`` (its champion)."""
        if isinstance(reference, VersionEntry):
            return reference
        with self.store.database.read() as connection:
            return versions.resolve(connection, reference)

    def versions(self, model: str, last: int | None = None) -> list[VersionEntry]:
        """Versions of a model, oldest first; ``last``: only that many of the newest."""
        with self.store.database.read() as connection:
            models.get(connection, model)
            return versions.of_model(connection, model, last)

    def version_count(self, model: str) -> int:
        with self.store.database.read() as connection:
            return versions.count(connection, model)

    def labels(self, digests: Iterable[str]) -> dict[str, str]:
        """``name@v3`` for each of ``digests`` that is a version's."""
        with self.store.database.read() as connection:
            return versions.labels(connection, digests)

    def aliases(self, model: str) -> list[Alias]:
        with self.store.database.read() as connection:
            models.get(connection, model)
            return aliases.of_model(connection, model)

    def move_alias(
        self, model: str, alias: str, to: str | VersionEntry, *, expected: int | None = None, reason: str = ""
    ) -> Alias:
        """Point a team's own alias at a version, if its revision still is ``expected`` (None: whatever it is).

        Raises ``BadInput`` for ``champion``, which only a release moves, ``StateMoved`` when the revision differs.
        """
        if alias == aliases.CHAMPION:
            raise BadInput(
                f"{model}@{alias} moves by a release: `meristem release propose`, `promote` or `rollback`"
            )
        version = self.version(to)
        with self.store.transaction(self.actor, reason) as tx:
            if expected is None:
                return aliases.point(tx, model, alias, version.digest)
            return aliases.move(tx, model, alias, version.digest, expected)

    def protect_alias(self, model: str, alias: str, actors: list[str], reason: str = "") -> None:
        """Let ``actors`` alone move ``model@alias``; an empty list lets everybody."""
        with self.store.transaction(self.actor, reason) as tx:
            models.get(tx.connection, model)
            aliases.protect(tx, model, alias, actors)

    def alias_actors(self, model: str, alias: str) -> list[str]:
        """Who alone may move a protected alias; empty for one that is not."""
        with self.store.database.read() as connection:
            return aliases.protectors(connection, model, alias)

    def alias_history(self, model: str, alias: str, last: int | None = None) -> list[Move]:
        """The moves of an alias, oldest first; ``last``: only that many of the newest."""
        with self.store.database.read() as connection:
            models.get(connection, model)
            return aliases.history(connection, model, alias, last)

    def checkout(self, reference: str | VersionEntry, to: str | Path) -> checkouts.Checkout:
        """Write a version as a plain Hugging Face / PEFT folder; every byte is checked on the way out."""
        report = self.progress
        step = (lambda done, total: report("checkout", done, total, "")) if report else None
        return checkouts.export(self.store, self.version(reference), Path(to), step)

    def push(self, reference: str | VersionEntry, to: str | Path) -> Pushed:
        """Write a version with all that it needs and its evidence as a bundle: a folder, or a URL such as ``s3://...``."""
        from meristem.ecosystem import bundles

        report, version = self.progress, self.version(reference)
        step = (lambda done, total: report(f"push {version.label}", done, total, "")) if report else None
        return bundles.push(self.store, version, to, step)

    def pull(self, where: str | Path) -> Pulled:
        """Take in the version of a bundle, checked whole before anything is written; see ``ecosystem.bundles``."""
        from meristem.ecosystem import bundles
        from meristem.evaluation.arrivals import check_arrival

        report, suites = self.progress, self.suites()
        step = (lambda what, done, total: report(f"{what} bundle", done, total, "")) if report else None
        inspect = partial(check_arrival, self.store, suites)
        return bundles.pull(self.store, self.actor, where, inspect=inspect, progress=step)

    def diff(self, first: str | VersionEntry, second: str | VersionEntry) -> dict[str, Any]:
        """What differs from ``first`` to ``second``: tensors and files by name, tasks, data, recipe."""
        from meristem.ecosystem.lineage import difference

        return difference(self.store, self.version(first), self.version(second))

    # Assets

    def add_data(self, name: str, file: str | Path) -> AssetEntry:
        """Add a JSONL file as the next version of data set ``name``; test items of any suite are refused."""
        from meristem.data.datasets import ROWS_FILE, load_body, read_dataset
        from meristem.evaluation.contamination import refuse_leaks

        models.check_name("data", name)
        body, facts = read_dataset(name, Path(file))
        refuse_leaks(self.store, str(file), load_body(bytes(body.data)), self._kept(self.suites()))
        return self._add_asset(
            Asset(kind="dataset", name=name, files={ROWS_FILE: body.digest}, facts=facts), [body]
        )

    def data(self) -> list[AssetEntry]:
        with self.store.database.read() as connection:
            return assets.listed(connection, ["dataset"])

    def add_suite(self, name: str, file: str | Path) -> AssetEntry:
        """Add a suite file with all its items; items that stand in a data set of the workspace are refused."""
        from meristem.data.datasets import load_rows
        from meristem.evaluation.contamination import refuse_leaks_into
        from meristem.evaluation.service import SUITE_FILE, suite_asset
        from meristem.evaluation.suite_files import load_suite

        models.check_name("suite", name)
        suite = load_suite(file)
        for entry in self._kept(self.data()):
            refuse_leaks_into(f"data {entry.label}", load_rows(self.store, entry.record.files), name, suite)
        body, facts = suite_asset(name, suite)
        return self._add_asset(
            Asset(kind="suite", name=name, files={SUITE_FILE: body.digest}, facts=facts), [body]
        )

    def suites(self) -> list[AssetEntry]:
        with self.store.database.read() as connection:
            return assets.listed(connection, ["suite"])

    def asset(self, kind: str, reference: str) -> AssetEntry:
        with self.store.database.read() as connection:
            return assets.resolve(connection, kind, reference)

    def given_up(self, kind: str) -> dict[str, Event]:
        """The assets of ``kind`` whose bytes were retired or deleted, by digest, with the event that says why."""
        with self.store.database.read() as connection:
            found = [entry.digest for entry in assets.listed(connection, [kind])]
            events = {digest: retirement.event_of(connection, digest) for digest in found}
        return {digest: event for digest, event in events.items() if event}

    def _kept(self, entries: list[AssetEntry]) -> list[AssetEntry]:
        with self.store.database.read() as connection:
            gone = retirement.all_given_up(connection)
        return [entry for entry in entries if entry.digest not in gone]

    def _datasets(self, names: list[str]) -> list[str]:
        """Digests of the named data sets, each once. Raises ``BadInput`` for one that was deleted or retired."""
        names = [names] if isinstance(names, str) else names
        digests = list(dict.fromkeys(self.asset("dataset", name).digest for name in names))
        with self.store.database.read() as connection:
            retirement.refuse(connection, *digests)
        return digests

    def _add_asset(self, record: Asset, blobs: list[Any]) -> AssetEntry:
        with self.store.database.read() as connection:
            assets.refuse_deleted(connection, record)
        stored = self.store.put(blobs)
        with self.store.transaction(self.actor, f"{record.kind} {record.name} added") as tx:
            tx.add_blobs(stored)
            return assets.add(tx, record)
