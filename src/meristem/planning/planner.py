"""From pending signals to one plan: what to train, how, and by which criteria it will be judged."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import Connection

from meristem.config import MethodConfig, ModelSettings, Recipe, resolve_recipe
from meristem.data.datasets import load_rows
from meristem.ecosystem import aliases, assets, ledger, versions
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Asset, Criterion, Plan, Signal
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, Clash
from meristem.evaluation.contamination import refuse_leaks
from meristem.methods import clashes
from meristem.methods.base import Method
from meristem.methods.registry import build, parse
from meristem.methods.trainers import KNOWN
from meristem.release import criteria
from meristem.store.store import Store, Transaction, read_document
from meristem.training.recipes import continued, maker_of, settled

# What each kind of signal is answered with; signals that bring no data wait for some.
_RETRY = {"regression", "incident"}
_SHAPES = {"cit": ("messages", "prompt-completion"), "cpt": ("text",), "ca": ("preference",)}
_NOT_BUILT = {
    "base-upgrade": "rebasing onto a new foundation (capability transfer) is not built yet: "
    "keep the pinned base, or add a model on the new one and train it from the recorded data",
}


def plan_next(store: Store, actor: str, settings: ModelSettings, model: str) -> Entry | None:
    """The open plan of ``model``, or a new one for its oldest pending signal; None when nothing is pending.

    Signals of one kind that bring data are answered together. Everything in the plan is fixed here, before
    training: data, recipe, suites, criteria.
    """
    with store.database.read() as connection:
        for entry in ledger.entries(connection, "plan", model=model, status="open"):
            return entry
        pending = ledger.entries(connection, "signal", model=model, status="pending")
        if not pending:
            return None
        first = pending[0].as_(Signal)
        together = (
            [e for e in pending if e.as_(Signal).kind == first.kind]
            if first.kind == "new-data"
            else pending[:1]
        )
        plan = _plan(connection, settings, model, together)
        champion = versions.by_digest(connection, plan.parent)
    recipe = _recipe(settings, plan.attempt, first.kind, maker_of(store, champion))
    return record_plan(store, actor, settings, plan, recipe if plan.action == "update" else None, together)


def plan_update(
    store: Store, actor: str, settings: ModelSettings, model: str, data: list[str], recipe: Recipe
) -> Entry:
    """A plan that a person asked for: this data with this recipe, judged by the model's policy."""
    with store.database.read() as connection:
        parent = versions.resolve(connection, f"{model}@{aliases.CHAMPION}")
        suites, fixed = _criteria(connection, settings, parent, data)
        plan = Plan(
            model=model,
            action="update",
            reason="asked for",
            signals=[],
            parent=parent.digest,
            data=data,
            suites=suites,
            criteria=fixed,
        )
    return record_plan(store, actor, settings, plan, recipe, [], status="manual")


def record_plan(
    store: Store,
    actor: str,
    settings: ModelSettings,
    plan: Plan,
    recipe: Recipe | None,
    signals: list[Entry],
    status: str = "open",
) -> Entry:
    """Check a plan's data against its suites and store it with its policy; its signals are taken.

    The loop carries out ``open`` plans; a ``manual`` one belongs to the person who asked for it. Raises
    ``StateMoved`` when a signal was closed or planned by somebody else meanwhile.
    """
    if recipe is not None:
        with store.database.read() as connection:
            champion = versions.by_digest(connection, plan.parent)
        parent = continued(store, recipe, champion, plan.data)
        plan = plan.model_copy(update={"parent": parent.digest})
        recipe = settled(store, recipe, parent)
        for digest in plan.data:
            _refuse_unfit(store, digest, recipe.stage)
    with store.transaction(actor, plan.reason) as tx:
        if recipe is not None:
            added = {
                "recipe": tx.add_document(recipe.document()),
                "policy": tx.add_document(settings.policy()),
                "budget": _budget(tx.connection, plan.data, recipe),
            }
            plan = plan.model_copy(update=added)
        if same := _same(tx, plan, status):
            return same
        entry = ledger.open_record(tx, "plan", plan, plan.model, status)
        for signal in signals:
            ledger.set_status(tx, signal, "planned", entry.digest, expected="pending")
    return entry


def close(store: Store, actor: str, plan: Entry, reason: str) -> None:
    """Give up an open plan. Raises ``BadInput`` for one that the loop does not wait for."""
    plan.as_(Plan)
    with store.transaction(actor, reason or f"{plan.id} given up") as tx:
        now = ledger.find(tx.connection, plan.id)
        if now.status != "open":
            raise BadInput(f"{plan.id} is {now.status}; only an open plan can be closed")
        ledger.set_status(tx, plan, "closed")


def _same(tx: Transaction, plan: Plan, status: str) -> Entry | None:
    for entry in ledger.entries(tx.connection, "plan", model=plan.model, status=status):
        if entry.digest == plan.digest:
            return entry
    return None


def _plan(connection: Connection, settings: ModelSettings, model: str, signals: list[Entry]) -> Plan:
    records = [entry.as_(Signal) for entry in signals]
    first = records[0]
    parent = versions.resolve(connection, f"{model}@{aliases.CHAMPION}")
    data = list(dict.fromkeys(digest for record in records for digest in record.data))
    ids = [entry.digest for entry in signals]
    if first.kind in _NOT_BUILT or not data:
        reason = _NOT_BUILT.get(
            first.kind, f"the {first.kind} signal brings no data to learn from; add a signal with some"
        )
        return Plan(model=model, action="wait", reason=reason, signals=ids, parent=parent.digest)
    suites, fixed = _criteria(connection, settings, parent, data)
    return Plan(
        model=model,
        action="update",
        reason=_reason(first),
        signals=ids,
        parent=parent.digest,
        attempt=int(first.details.get("attempt", 0)) + 1,
        data=data,
        suites=suites,
        criteria=fixed,
    )


def _reason(signal: Signal) -> str:
    if signal.kind in _RETRY:
        return f"{signal.kind}: {signal.note or 'reported'}; learn the same data with protection against forgetting"
    return f"{signal.kind}: {signal.note or 'learn it on top of the champion'}"


def _recipe(settings: ModelSettings, attempt: int, kind: str, maker: MethodConfig | None) -> Recipe:
    """First attempts use the model's plain methods, what follows a regression or an incident the protecting ones.

    The same recipe again would give the same weights, so from the third attempt on each halves the learning rate.
    """
    retry = attempt > 1 or kind in _RETRY
    built = [parse(text) for text in (settings.retry_methods if retry else settings.methods)]
    if retry and maker and maker.name not in [method.label for method in built]:
        built = _protecting(settings, maker, built)
    methods = [{"name": method.label, "arguments": method.arguments()} for method in built]
    recipe = resolve_recipe(settings.recipe, {"methods": methods})
    return recipe.slower(0.5 ** max(0, attempt - 2))


def _protecting(settings: ModelSettings, maker: MethodConfig, added: list[Method]) -> list[Method]:
    """``maker``, without which the line cannot go on, and those of ``added`` that go with it."""
    own = [method for text in settings.methods if (method := parse(text)).label == maker.name]
    chosen = own[:1] or [build(maker.name, maker.arguments)]
    for method in added:
        with suppress(Clash):
            clashes.refuse([*chosen, method], "Trainer", KNOWN["Trainer"])
            chosen.append(method)
    return chosen


def _criteria(
    connection: Connection, settings: ModelSettings, parent: VersionEntry, data: list[str]
) -> tuple[dict[str, str], list[Criterion]]:
    new = criteria.tasks_of(connection, data)
    newest = criteria.newest_suites(connection)
    fixed = criteria.spelled_out(settings, newest, new, set(parent.record.tasks))
    if not any(map(criteria.compares, fixed)):
        raise BadInput(
            f"no gate of model {parent.model} that compares versions applies to any suite, so the update could never be released: add a "
            f"suite with a task named {' or '.join(sorted(new))} (`meristem suite add`)"
        )
    named = {criterion.suite for criterion in fixed}
    return {entry.name: entry.digest for entry in newest if entry.name in named}, fixed


def _budget(connection: Connection, data: list[str], recipe: Recipe) -> dict[str, Any]:
    """What the update may spend: rows replayed by a method come on top of the new ones, up to ``max_steps``."""
    rows = sum(_facts(connection, digest)["rows"] for digest in data)
    return {"new_rows": rows, "epochs": recipe.epochs, "max_steps": recipe.max_steps}


def _facts(connection: Connection, digest: str) -> dict[str, Any]:
    return Asset.from_document(read_document(connection, digest)).facts


def _refuse_unfit(store: Store, digest: str, stage: str) -> None:
    """Raises ``BadInput`` for data that the stage cannot learn, or that holds test items."""
    with store.database.read() as connection:
        entry = assets.resolve(connection, "dataset", digest)
        suites = criteria.newest_suites(connection)
    shape = entry.record.facts["shape"]
    if shape not in _SHAPES[stage]:
        raise BadInput(
            f"data {entry.label} has {shape} rows; stage {stage} learns {' and '.join(_SHAPES[stage])} rows"
        )
    refuse_leaks(store, f"data {entry.label}", load_rows(store, entry.record.files), suites)
