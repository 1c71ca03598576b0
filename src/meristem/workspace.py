"""``Workspace``: the object that a user holds. Each verb calls one room of the house."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem import config as configuration
from meristem.config import CONFIG_NAME, ModelSettings, Recipe, resolve_recipe
from meristem.custody import STORE_FOLDER, Custody, Progress, check_gates, store_of
from meristem.ecosystem import aliases, assets, checkouts, ledger, models, retirement, versions
from meristem.ecosystem.aliases import Alias, Move
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import (
    Asset,
    Decision,
    GateResult,
    Model,
    Plan,
    Reproduction,
    Update,
    UpdateOutcome,
)
from meristem.ecosystem.results import DecisionResult, UpdateResult
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.store.evidence import Event
from meristem.store.files import make_folder
from meristem.store.packs import disk_failure, write_file_durably
from meristem.store.store import read_document

if TYPE_CHECKING:
    from meristem.ecosystem.bundles import Pulled, Pushed
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.matrix import LineMatrix
    from meristem.evaluation.results import ItemResult
    from meristem.evaluation.service import EvaluationEntry, Evaluator
    from meristem.loop import Turn

__all__ = ["DecisionResult", "Progress", "UpdateResult", "Workspace"]


class Workspace(Custody):
    """A folder with ``meristem.yaml`` and a store. Open one with ``Workspace.open`` or ``Workspace.create``.

    ``actor`` is recorded with everything this object changes (default: ``MERISTEM_ACTOR`` or the login name).
    ``progress(what, done, total, note)`` is called during long work.
    """

    def __init__(self, root: Path, *, actor: str | None = None, progress: Progress | None = None):
        super().__init__(root, actor=actor, progress=progress)
        self._evaluator: Evaluator | None = None

    @classmethod
    def create(cls, root: str | Path, **options: Any) -> Workspace:
        """Make a new workspace in ``root`` (made if missing). Raises ``BadInput`` if there is one already."""
        root = Path(root)
        if root.exists() and not root.is_dir():
            raise BadInput(f"{root}: this is a file; give a folder")
        configured = (root / CONFIG_NAME).exists()
        config = configuration.load_config(root / CONFIG_NAME) if configured else None
        try:
            make_folder(root / STORE_FOLDER)
            with closing(store_of(root, config).database) as database:
                # By a `create` that was cut off, or by a workspace that lost its file.
                made = database.exists()
                if made and configured:
                    raise BadInput(f"{root}: there is a workspace already; open it, or choose another folder")
                if not configured:
                    write_file_durably(root / CONFIG_NAME, configuration.TEMPLATE.encode())
                if not made:
                    database.create()
        except OSError as error:
            raise disk_failure(error, root) from error
        return cls.open(root, **options)

    @classmethod
    def open(cls, root: str | Path = ".", **options: Any) -> Workspace:
        """Open the workspace in ``root``. Raises ``BadInput`` when there is none."""
        root = Path(root)
        if not (root / CONFIG_NAME).exists():
            raise BadInput(f"{root}: no {CONFIG_NAME} here; make a workspace with `meristem init {root}`")
        workspace = cls(root, **options)
        workspace.store.database.check_schema()
        return workspace

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
        report = self.progress
        step = (lambda done, total: report(f"store {name}", done, total, "")) if report else None
        return models.add(self.store, self.actor, name, tier, source, base, step)

    def commit(self, model: str, source: str | Path, reason: str = "") -> VersionEntry:
        """Add weights made elsewhere as successor of the champion; they become the challenger."""
        report = self.progress
        step = (lambda done, total: report(f"store {model}", done, total, "")) if report else None
        return models.commit(self.store, self.actor, model, source, reason, step)

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
        from meristem.evaluation.suites import load_suite

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

    # Signals, plans and updates

    def signal(self, kind: str, model: str, *, data: list[str] | None = None, note: str = "") -> Entry:
        """Record why an update may be needed; the loop answers it."""
        from meristem.monitoring import signals

        with self.store.database.read() as connection:
            models.get(connection, model)
        digests = self._datasets(data or [])
        return signals.add(self.store, self.actor, kind=kind, model=model, data=digests, note=note)

    def close_signal(self, name: str, reason: str) -> Entry:
        """Take back a pending signal, so that the loop does not answer it."""
        from meristem.monitoring import signals

        signals.close(self.store, self.actor, self.record(name), reason)
        return self.record(name)

    def records(self, kind: str, model: str | None = None) -> list[Entry]:
        """Signals, plans, updates, decisions, approvals or releases, oldest first."""
        with self.store.database.read() as connection:
            return ledger.entries(connection, kind, model=model)

    def record(self, name: str, kind: str | None = None) -> Entry:
        """The record called e.g. ``decision-2``; of ``kind``, when one is asked for."""
        with self.store.database.read() as connection:
            entry = ledger.find(connection, name)
        if kind not in (None, entry.kind):
            raise BadInput(f"{name} is no {kind}; give the id of one")
        return entry

    def plan(self, model: str) -> Entry | None:
        """The plan that the loop would carry out now, made if signals are pending; None when none are."""
        from meristem.planning import planner

        with self.store.database.read() as connection:
            models.get(connection, model)
        return planner.plan_next(self.store, self.actor, self.settings(model), model)

    def close_plan(self, name: str, reason: str = "") -> Entry:
        """Give up an open plan, so that the loop goes on to the next signal."""
        from meristem.planning import planner

        planner.close(self.store, self.actor, self.record(name), reason)
        return self.record(name)

    def update(
        self,
        model: str,
        *,
        data: list[str],
        methods: list[str] | None = None,
        recipe: dict[str, Any] | Recipe | None = None,
    ) -> UpdateResult:
        """Train the champion of ``model`` on ``data``; the same call again finishes an interrupted one.

        ``methods`` are names with arguments (``"ewc:strength=1000"``); given, they replace those of ``recipe``.
        """
        from meristem.methods.registry import parse
        from meristem.planning import planner

        settings = self.settings(model)
        built = [parse(text) for text in methods or []]
        added = {"methods": [{"name": m.label, "arguments": m.arguments()} for m in built]} if built else {}
        own = dict(recipe or {})  # a Recipe too: its lora keeps what was left open
        resolved = resolve_recipe(settings.recipe, own, added)
        digests = self._datasets(data)
        if not digests:
            raise BadInput("an update needs at least one data set")
        with self.store.database.read() as connection:  # before there is a plan that nobody may carry out
            aliases.check_actor(connection, model, aliases.CHALLENGER, self.actor)
        plan = planner.plan_update(self.store, self.actor, settings, model, digests, resolved)
        return self.run_plan(plan)

    def run_plan(self, plan: Entry) -> UpdateResult:
        """Carry out a plan's update, or go on with it."""
        from meristem.training import updates

        record = plan.as_(Plan)
        if record.recipe is None:
            raise BadInput(f"{plan.id} trains nothing: {record.reason}")
        recipe = Recipe.from_document(self.store.document(record.recipe))
        with self.store.database.read() as connection:
            parent = versions.by_digest(connection, record.parent)
        entry = updates.open_update(self.store, self.actor, parent=parent, data=record.data, recipe=recipe)
        return self.resume(entry.id)

    def resume(self, name: str) -> UpdateResult:
        """Run or go on running an update; a finished one is returned as it is."""
        from meristem.training import updates

        if self._evaluator is not None:
            self._evaluator.release_memory()
        entry = self.record(name)
        entry.as_(Update)
        updates.run(self.store, self.actor, entry, self.progress)
        return self.update_result(name)

    def reproduce(self, reference: str) -> Reproduction:
        """Execute an update (``update-3``, or a reference of the version it made) again, and compare every bit.

        Nothing but the finding is added. See ``training.reproduce``.
        """
        from meristem.training import reproduce

        if re.fullmatch(r"update-[0-9]+", reference):
            entry = self.record(reference, "update")
        else:
            version = self.version(reference)
            with self.store.database.read() as connection:
                entry = reproduce.of_version(connection, version)
        if self._evaluator is not None:
            self._evaluator.release_memory()
        return reproduce.reproduce(self.store, self.actor, entry, self.progress)

    def close_update(self, name: str, reason: str = "") -> Entry:
        """Give up an update that is not done; running it again opens it again."""
        from meristem.training import updates

        updates.close(self.store, self.actor, self.record(name), reason)
        return self.record(name)

    def update_result(self, name: str) -> UpdateResult:
        with self.store.database.read() as connection:
            entry = ledger.find(connection, name)
            record = entry.as_(Update)
            if entry.result is None:
                return UpdateResult(entry, record, None, None)
            outcome = UpdateOutcome.from_document(read_document(connection, entry.result))
            return UpdateResult(entry, record, versions.by_digest(connection, outcome.version), outcome)

    # Evaluation

    def evaluator(self) -> Evaluator:
        from meristem.evaluation.service import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self.store, self.config.evaluation, self.actor, self.progress)
        return self._evaluator

    def evaluate(self, reference: str | VersionEntry, suite: str) -> EvaluationEntry:
        """Scores of a version on a suite: from the store if known, else measured and stored."""
        return self.evaluator().evaluate(self.version(reference), self.asset("suite", suite))

    def evaluations(self) -> list[EvaluationEntry]:
        """Every evaluation in the store; nothing is computed."""
        from meristem.evaluation.service import stored_evaluations

        return stored_evaluations(self.store)

    def results(self, evaluation: EvaluationEntry) -> list[ItemResult]:
        return self.evaluator().results(evaluation)

    def compare(self, new: str | VersionEntry, old: str | VersionEntry, *, suite: str) -> Comparison:
        """Paired comparison of two versions, item by item; differences are new - old."""
        before, after = self.evaluate(old, suite), self.evaluate(new, suite)
        return self.evaluator().compare(before, after)

    def task_matrix(self, reference: str | VersionEntry) -> LineMatrix:
        """A[t, i] over the line of versions behind ``reference``, with ACC, BWT, FWT and forgetting."""
        from meristem.evaluation.matrix import line_matrix

        version = self.version(reference)
        with self.store.database.read() as connection:
            line = [v for v in versions.ancestors(connection, version) if v.model == version.model]
        return line_matrix(self.evaluator().task_score, line[::-1], self.suites())

    def judge(
        self, new: str | VersionEntry, old: str | VersionEntry, *, suite: str, gate: str, **arguments: Any
    ) -> GateResult:
        """What a gate would say about two versions; nothing is recorded. For trying out a policy."""
        from meristem.release import gates

        return gates.judge(gate, arguments, suite, self.compare(new, old, suite=suite))

    # Release

    def propose(self, reference: str | VersionEntry, *, plan: Entry | None = None) -> DecisionResult:
        """Judge a version against the champion by the criteria fixed before its training."""
        from meristem.release import decisions

        version = self.version(reference)
        plan = plan or self._plan_of(version)
        settings = self.settings(version.model)
        entry = decisions.propose(self.store, self.actor, settings, self.evaluator(), version, plan)
        return self.explain(entry.id)

    def explain(self, decision: str) -> DecisionResult:
        from meristem.release import decisions

        with self.store.database.read() as connection:
            entry = ledger.find(connection, decision)
            return DecisionResult(entry, entry.as_(Decision), decisions.approvers(connection, entry))

    def approve(self, decision: str, reason: str = "") -> Entry:
        from meristem.release import decisions

        return decisions.approve(self.store, self.actor, self.record(decision), reason)

    def promote(self, decision: str | DecisionResult, reason: str = "") -> Entry:
        """Make the decided version the champion, if the champion is still the one it was judged against."""
        from meristem.release import rollout

        name = decision if isinstance(decision, str) else decision.id
        return rollout.promote(self.store, self.actor, self.record(name), reason)

    def rollback(
        self,
        model: str,
        to: str | VersionEntry | None = None,
        reason: str = "",
        *,
        expected: int | None = None,
    ) -> Entry:
        """Point the champion back at a version that was champion before; bytes are checked, nothing computed.

        With ``expected``, only while the champion's revision is this one: then the call is safe to repeat.
        """
        from meristem.release import rollout

        with self.store.database.read() as connection:
            models.get(connection, model)
        return rollout.rollback(
            self.store, self.actor, model, self.version(to) if to else None, reason, expected
        )

    def history(self, model: str, last: int | None = None) -> list[Entry]:
        """Releases of a model, oldest first: promotions and rollbacks; ``last``: only that many of the newest."""
        with self.store.database.read() as connection:
            models.get(connection, model)
            return ledger.entries(connection, "release", model=model, last=last)

    def _plan_of(self, version: VersionEntry) -> Entry | None:
        """The newest plan for the training that made ``version``: the same parent, data and recipe."""
        made = version.record
        with self.store.database.read() as connection:
            for entry in ledger.newest_first(connection, "plan", version.model):
                plan = entry.as_(Plan)
                if ([plan.parent], plan.data, plan.recipe) == (made.parents, made.data, made.recipe):
                    return entry
        return None

    # Loop

    def turn(self, model: str) -> Turn | None:
        """One turn of the loop for ``model``; None when no signal is pending."""
        from meristem.loop import turn

        return turn(self, model)
