"""The whole store contract as a state machine: Hypothesis looks for a sequence of steps that breaks it.

::

    class MyMachine(StoreMachine):
        make = staticmethod(new_workspace)   # see below

    TestMyStore = MyMachine.TestCase

Steps: store bytes, name them by a version (or let the lease run out), move aliases rightly and wrongly, protect them,
decide, release, roll back, collect garbage with and without a retention rule, delete data, rebuild the index, open the
store anew. After every step what was promised is compared with a model of a few dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select

from meristem.ecosystem import aliases, assets, audit, deletion, gc, ledger, versions
from meristem.ecosystem.records import Asset, Content, Decision, Model, Version
from meristem.errors import BadInput, StateMoved
from meristem.release import rollout
from meristem.store import evidence
from meristem.store.packs import Blob
from meristem.store.schema import blobs, models, retired
from meristem.store.store import Store, Stored
from meristem.testing.values import file, tensor

MODEL = "m"
POLICY = {"schema": "meristem/policy/v1", "gates": [], "approvals": 0}
ACTORS = ("kim", "lee")
NAMES = ("challenger", "canary")
_VALUES = st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True)


@dataclass
class _Pending:
    stored: Stored
    values: tuple[int, ...]
    until: float


class StoreMachine(RuleBasedStateMachine):
    # Makes an empty workspace with its tables; returns what opens it, each time as another process would.
    make: ClassVar[Callable[[], Callable[[], Store]]]

    def __init__(self) -> None:
        super().__init__()
        self.open = type(self).make()
        self.skew = 0.0  # how far this machine's clock was turned on
        self.store = self._opened()
        self.pending: list[_Pending] = []
        self.values: dict[str, tuple[int, ...]] = {}  # version -> what its tensors hold
        self.order: list[str] = []
        self.moves: dict[str, list[str]] = {}  # alias -> every version it pointed at
        self.guards: dict[str, tuple[str, ...]] = {}
        self.decisions: list[tuple[ledger.Entry, int]] = []
        self.made_by: dict[int, str] = {}  # revision of the champion -> the decision that made it
        self.data: dict[int, str] = {}
        self.deleted: set[int] = set()

    @initialize()
    def a_model(self) -> None:
        stored = self.store.put([tensor(0.0)])
        with self.store.transaction("kim") as tx:
            tx.add_blobs(stored)
            record = Model(name=MODEL, tier="foundation", base=None, source="folder x", fingerprint=None)
            digest = tx.add_document(record.document())
            tx.add_document(POLICY)
            tx.connection.execute(models.insert().values(name=MODEL, tier="foundation", document=digest))
            tx.append("model.added", digest, name=MODEL, tier="foundation", base=None)
            entry = self._create(tx, (0,))
            aliases.move(tx, MODEL, aliases.CHAMPION, entry.digest, 0)
        self._know(entry.digest, (0,))
        self.moves[aliases.CHAMPION] = [entry.digest]

    # Writers

    @rule(values=_VALUES)
    def put(self, values: list[int]) -> None:
        stored = self.store.put([tensor(float(v)) for v in values])
        self.pending.append(_Pending(stored, tuple(values), self._now() + self.store.lease_seconds))

    @precondition(lambda self: self.pending)
    @rule(pick=st.integers(0, 9))
    def commit(self, pick: int) -> None:
        made = self.pending.pop(pick % len(self.pending))
        if made.until <= self._now():  # held up for too long
            with pytest.raises(StateMoved, match="lease"), self.store.transaction("kim") as tx:
                tx.add_blobs(made.stored)
            return
        with self.store.transaction("kim") as tx:
            tx.add_blobs(made.stored)
            entry = self._create(tx, made.values)
        self._know(entry.digest, made.values)

    @precondition(lambda self: self.pending)
    @rule()
    def crash_before_the_commit(self) -> None:
        self.pending.pop()

    @rule(values=_VALUES)
    def fail_inside_a_transaction(self, values: list[int]) -> None:
        stored = self.store.put([tensor(float(v)) for v in values])
        with pytest.raises(RuntimeError), self.store.transaction("kim") as tx:
            tx.add_blobs(stored)
            self._create(tx, tuple(values))
            raise RuntimeError

    @rule(seconds=st.sampled_from([1.0, 400.0, 2000.0, 200_000.0]))
    def wait(self, seconds: float) -> None:
        self.skew += seconds

    # Aliases

    @rule(
        name=st.sampled_from(NAMES),
        pick=st.integers(0, 9),
        actor=st.sampled_from(ACTORS),
        off=st.integers(-1, 1),
    )
    def move(self, name: str, pick: int, actor: str, off: int) -> None:
        to, before = self._version(pick), self.moves.get(name, [])
        if self._is_retired(to):
            return
        allowed = not self.guards.get(name) or actor in self.guards[name]
        try:
            with self.store.transaction(actor) as tx:
                aliases.move(tx, MODEL, name, to, len(before) + off)
        except StateMoved:
            assert off and allowed
        except BadInput as error:
            assert not allowed, error
        else:
            assert allowed and off == 0
            self.moves[name] = [*before, to]

    @rule(
        name=st.sampled_from((*NAMES, aliases.CHAMPION)),
        actor=st.sampled_from(ACTORS),
        who=st.sets(st.sampled_from(ACTORS)),
    )
    def protect(self, name: str, actor: str, who: set[str]) -> None:
        allowed = not self.guards.get(name) or actor in self.guards[name]
        allowed = allowed and (not who or actor in who)
        try:
            with self.store.transaction(actor) as tx:
                aliases.protect(tx, MODEL, name, sorted(who))
        except BadInput:
            assert not allowed
        else:
            assert allowed
            self.guards[name] = tuple(sorted(who))

    # Releases

    @rule(pick=st.integers(0, 9))
    def decide(self, pick: int) -> None:
        to = self._version(pick)
        champion = self.moves[aliases.CHAMPION]
        if to == champion[-1] or self._is_retired(to):
            return
        with self.store.transaction("kim") as tx:
            decision = Decision(
                model=MODEL,
                version=to,
                champion=champion[-1],
                champion_revision=len(champion),
                plan=None,
                policy=tx.add_document(POLICY),
                evaluations=[],
                gates=[],
                outcome="pass",
                approvals_needed=0,
            )
            entry = ledger.open_record(tx, "decision", decision, MODEL, status="pass")
        self.decisions.append((entry, len(champion)))

    @precondition(lambda self: self.decisions)
    @rule(pick=st.integers(0, 9), actor=st.sampled_from(ACTORS))
    def promote(self, pick: int, actor: str) -> None:
        entry, revision = self.decisions[pick % len(self.decisions)]
        champion = self.moves[aliases.CHAMPION]
        guard = self.guards.get(aliases.CHAMPION)
        if self.made_by.get(len(champion)) == entry.id:
            rollout.promote(self.store, actor, entry)  # released already, and nothing since: nothing happens
        elif revision != len(champion):
            with pytest.raises((StateMoved, BadInput)):
                rollout.promote(self.store, actor, entry)
        elif guard and actor not in guard:
            with pytest.raises(BadInput, match="protected"):
                rollout.promote(self.store, actor, entry)
        else:
            rollout.promote(self.store, actor, entry)
            self.moves[aliases.CHAMPION] = [*champion, entry.as_(Decision).version]
            self.made_by[len(champion) + 1] = entry.id

    @rule(pick=st.integers(0, 9), actor=st.sampled_from(ACTORS))
    def roll_back(self, pick: int, actor: str) -> None:
        champion = self.moves[aliases.CHAMPION]
        to = self._version(pick)
        guard = self.guards.get(aliases.CHAMPION)
        with self.store.database.read() as connection:
            entry = versions.by_digest(connection, to)
        if to == champion[-1] or to not in champion or (guard and actor not in guard):
            with pytest.raises(BadInput):
                rollout.rollback(self.store, actor, MODEL, entry)
            return
        rollout.rollback(self.store, actor, MODEL, entry)
        self.moves[aliases.CHAMPION] = [*champion, to]

    # Data, garbage, repairs

    @rule(number=st.integers(0, 3))
    def add_data(self, number: int) -> None:
        body = _rows(number)
        record = Asset(
            kind="dataset", name=f"d{number}", files={"rows.jsonl": body.digest}, facts={"tasks": []}
        )
        if number in self.deleted:
            with pytest.raises(BadInput, match="deleted"), self.store.transaction("kim") as tx:
                assets.add(tx, record)
            return
        stored = self.store.put([body])
        with self.store.transaction("kim") as tx:
            tx.add_blobs(stored)
            self.data[number] = assets.add(tx, record).digest

    @precondition(lambda self: self.data)
    @rule(pick=st.integers(0, 3))
    def delete_data(self, pick: int) -> None:
        number = sorted(self.data)[pick % len(self.data)]
        try:
            deletion.delete(self.store, "kim", f"d{number}", "asked to")
        except StateMoved:  # somebody stores the same bytes just now
            return
        del self.data[number]
        self.deleted.add(number)

    @rule(rules=st.sampled_from([{}, {"full": 0.001, "dataset": 0.001}, {"full": 1}]))
    def collect(self, rules: dict[str, float]) -> None:
        gc.collect(self.store, "kim", rules)

    @rule()
    def rebuild(self) -> None:
        before = self._index()
        self.store.rebuild_index()
        assert before.keys() <= self._index().keys()

    @rule()
    def restart(self) -> None:
        self.store.database.close()
        self.store = self._opened()

    # What must hold after every step

    @invariant()
    def every_alias_is_where_it_was_put(self) -> None:
        with self.store.database.read() as connection:
            found = {alias.name: alias for alias in aliases.of_model(connection, MODEL)}
            assert found.keys() == self.moves.keys()
            for name, moves in self.moves.items():
                assert (found[name].version, found[name].revision) == (moves[-1], len(moves))
                assert [move.version for move in aliases.history(connection, MODEL, name)] == moves
                told = [
                    event.subject
                    for event in evidence.read(connection, kind="alias.moved")
                    if event.data["alias"] == name
                ]
                assert told == moves
                assert tuple(aliases.protectors(connection, MODEL, name)) == self.guards.get(name, ())

    @invariant()
    def every_version_has_its_bytes(self) -> None:
        gone = self._retired()
        for version, values in self.values.items():
            if version not in gone:
                assert [self.store.read_blob(tensor(float(v)).digest) for v in values]
        needed = {moves[-1] for moves in self.moves.values()} | set(self.moves.get(aliases.CHAMPION, []))
        needed |= {
            entry.as_(Decision).version
            for entry, revision in self.decisions
            if revision == len(self.moves[aliases.CHAMPION])
        }
        assert not needed & gone

    @invariant()
    def deleted_data_is_gone_and_the_rest_is_there(self) -> None:
        gone = self._retired()
        index = self._index()
        for number, digest in self.data.items():
            assert digest in gone or self.store.read_blob(_rows(number).digest)
        leased = self.pending and any(made.stored.lease for made in self.pending)
        for number in self.deleted:
            assert leased or _rows(number).digest not in index

    @invariant()
    def nothing_shows_tampering(self) -> None:
        found = audit.verify(self.store)
        assert found.intact, found.problems

    def teardown(self) -> None:
        self.store.database.close()

    def _create(self, tx: Any, values: tuple[int, ...]) -> versions.VersionEntry:
        tensors = {f"w{i}": tensor(float(v)).digest for i, v in enumerate(values)}
        content = Content(kind="full", base=None, tensors=tensors, files={})
        return versions.create(
            tx, content, Version(model=MODEL, content=content.digest, base=None, parents=[])
        )

    def _know(self, digest: str, values: tuple[int, ...]) -> None:
        self.values[digest] = values
        self.order = list(dict.fromkeys([*self.order, digest]))

    def _version(self, pick: int) -> str:
        return self.order[pick % len(self.order)]

    def _retired(self) -> set[str]:
        with self.store.database.read() as connection:
            return set(connection.scalars(select(retired.c.digest)))

    def _is_retired(self, version: str) -> bool:
        return version in self._retired()

    def _index(self) -> dict[str, str]:
        with self.store.database.read() as connection:
            return {row.digest: row.pack for row in connection.execute(select(blobs))}

    def _now(self) -> float:
        with self.store.database.read() as connection:
            return self.store.database.now(connection)

    def _opened(self) -> Store:
        store = self.open()
        now = store.database.now
        store.database.now = lambda connection: now(connection) + self.skew  # type: ignore[method-assign]
        return store


def _rows(number: int) -> Blob:
    return file(b'{"id": "%d", "task": "t", "text": "row"}\n' % number)
