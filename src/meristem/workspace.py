"""``Workspace``: the object that a user holds. Each verb calls one room of the house."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem import config as configuration
from meristem.assessment import Assessment
from meristem.config import CONFIG_NAME, Recipe, resolve_recipe
from meristem.custody import STORE_FOLDER, Progress, store_of
from meristem.ecosystem import aliases, ledger, models, versions
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import (
    Decision,
    Plan,
    Reproduction,
    Update,
    UpdateOutcome,
)
from meristem.ecosystem.results import DecisionResult, UpdateResult
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.store.files import make_folder
from meristem.store.packs import disk_failure, write_file_durably
from meristem.store.store import read_document

if TYPE_CHECKING:
    from meristem.loop import Turn

__all__ = ["DecisionResult", "Progress", "UpdateResult", "Workspace"]


class Workspace(Assessment):
    """A folder with ``meristem.yaml`` and a store. Open one with ``Workspace.open`` or ``Workspace.create``.

    ``actor`` is recorded with everything this object changes (default: ``MERISTEM_ACTOR`` or the login name).
    ``progress(what, done, total, note)`` is called during long work.
    """

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
            parent = versions.by_digest(connection, record.parent)
            if entry.result is None:
                return UpdateResult(entry, record, parent, None, None)
            outcome = UpdateOutcome.from_document(read_document(connection, entry.result))
            made = versions.by_digest(connection, outcome.version)
            return UpdateResult(entry, record, parent, made, outcome)

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
