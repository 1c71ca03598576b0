"""Aliases: compare-and-swap, exactly one winner, and a history that says everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.ecosystem.test_models import grow

from meristem.ecosystem import aliases, audit
from meristem.errors import BadInput, StateMoved
from meristem.store import evidence
from meristem.store.schema import aliases as table
from meristem.store.schema import events


@pytest.fixture
def line(store, add):
    """``base`` with four versions; v1 is the champion."""
    return [add("base"), *(grow(store, "base", count) for count in (1, 2, 3))]


def move(store, name, to, expected):
    with store.transaction("kim", "because") as tx:
        return aliases.move(tx, "base", name, to.digest, expected)


def test_a_move_is_a_new_revision_with_its_event(store, line):
    assert move(store, "champion", line[1], 1).revision == 2
    assert move(store, "canary", line[2], 0).revision == 1
    with store.database.read() as connection:
        assert [(a.name, a.version, a.revision) for a in aliases.of_model(connection, "base")] == [
            ("canary", line[2].digest, 1),
            ("champion", line[1].digest, 2),
        ]
        first, second = aliases.history(connection, "base", "champion")
        assert (first.version, first.previous) == (line[0].digest, None)
        assert (second.version, second.previous, second.revision) == (line[1].digest, line[0].digest, 2)
        kind = connection.scalar(
            events.select().with_only_columns(events.c.kind).where(events.c.sequence == second.event)
        )
    assert kind == "alias.moved"


def test_a_stale_move_is_told_what_happened_and_changes_nothing(store, line):
    move(store, "champion", line[2], 1)
    with store.database.read() as connection:
        before = list(connection.execute(events.select()))
    with pytest.raises(
        StateMoved, match="the champion moved from v1 to v3; compare with it and decide again"
    ):
        move(store, "champion", line[1], 1)
    with pytest.raises(StateMoved, match="moved from nothing to v3"):
        move(store, "champion", line[1], 0)
    with pytest.raises(StateMoved):
        move(store, "canary", line[1], 3)
    move(store, "champion", line[0], 2)
    with pytest.raises(StateMoved, match="moved away from v1 and back"):
        move(store, "champion", line[1], 1)
    with store.database.read() as connection:
        assert list(connection.execute(events.select()))[: len(before)] == before
        assert aliases.champion(connection, "base").revision == 3


def test_an_alias_points_only_at_versions_of_its_model(store, line, add):
    other = add("other")
    with pytest.raises(BadInput, match="not a version of model base"):
        move(store, "champion", other, 1)
    with pytest.raises(BadInput, match="not a version of model base"), store.transaction("kim") as tx:
        aliases.move(tx, "base", "champion", "sha256:" + "0" * 64, 1)


@pytest.mark.parametrize("name", ["v3", "", "A", "a@b", "sha256:00", "a b", "x" * 65])
def test_a_name_that_could_not_be_found_again_is_refused(store, line, name):
    with pytest.raises(BadInput, match="alias"):
        move(store, name, line[1], 0)


def test_a_model_without_a_champion_says_so(store, line):
    with store.database.write() as connection:
        connection.execute(table.delete())
    with (
        store.database.read() as connection,
        pytest.raises(BadInput, match="no champion; release a version first"),
    ):
        aliases.champion(connection, "base")


def test_the_history_says_who_when_and_why(store, line):
    for number, actor in enumerate(("kim", "lee", "sam"), start=1):
        with store.transaction(actor, f"reason {number}") as tx:
            aliases.move(tx, "base", "canary", line[number].digest, number - 1)
    with store.database.read() as connection:
        moves = aliases.history(connection, "base", "canary")
        assert aliases.history(connection, "base", "canary", last=2) == moves[1:]
        assert aliases.history(connection, "base", "shadow") == []
        told = {event.sequence: event for event in evidence.read(connection)}
    assert [(move.actor, move.reason) for move in moves] == [
        ("kim", "reason 1"), ("lee", "reason 2"), ("sam", "reason 3"),
    ]  # fmt: skip
    for move in moves:
        assert (move.version, move.time) == (told[move.event].subject, told[move.event].time)


def test_to_point_where_it_points_is_no_move(store, line):
    for to, revision in ((1, 1), (1, 1), (2, 2), (1, 3)):
        with store.transaction("kim") as tx:
            assert aliases.point(tx, "base", "canary", line[to].digest).revision == revision
    with store.database.read() as connection:
        assert len(aliases.history(connection, "base", "canary")) == 3
        assert aliases.was_at(connection, "base", "canary", line[2].digest)
        assert not aliases.was_at(connection, "base", "canary", line[3].digest)


def protect(store, actor, *actors):
    with store.transaction(actor, "because") as tx:
        aliases.protect(tx, "base", "champion", list(actors))


def test_a_protected_alias_is_moved_by_the_actors_it_names(store, line):
    protect(store, "kim", "sam", "kim", "sam")
    with store.transaction("lee") as tx, pytest.raises(BadInput, match="kim, sam may move it, lee may not"):
        aliases.move(tx, "base", "champion", line[1].digest, 1)
    with store.transaction("lee") as tx:
        aliases.move(tx, "base", "canary", line[1].digest, 0)  # another one is free
    assert move(store, "champion", line[1], 1).revision == 2
    with store.transaction("lee") as tx, pytest.raises(BadInput, match="lee may not"):
        aliases.point(tx, "base", "champion", line[2].digest)
    with store.database.read() as connection:
        assert aliases.protectors(connection, "base", "champion") == ["kim", "sam"]
        assert [e.data["actors"] for e in evidence.read(connection, kind="alias.protected")] == [
            ["kim", "sam"]
        ]
    assert audit.verify(store).intact


def test_who_may_change_the_protection(store, line):
    with pytest.raises(BadInput, match="name yourself"):
        protect(store, "kim", "sam")
    protect(store, "kim", "kim", "sam")
    for actors in ([], ["lee"], ["lee", "kim"]):
        with pytest.raises(BadInput, match="lee may not"):
            protect(store, "lee", *actors)
    protect(store, "kim", "sam", "kim")  # as it is: no event
    protect(store, "sam", "sam")
    with pytest.raises(BadInput, match="kim may not"):
        protect(store, "kim", "kim")
    protect(store, "sam")
    protect(store, "lee", "lee")  # free again
    with store.database.read() as connection:
        told = [event.data["actors"] for event in evidence.read(connection, kind="alias.protected")]
    assert told == [["kim", "sam"], ["sam"], [], ["lee"]]
    with pytest.raises(BadInput, match="alias 'v1'"), store.transaction("kim") as tx:
        aliases.protect(tx, "base", "v1", ["kim"])


def test_the_swap_itself_compares(store, line, monkeypatch):
    """Should the read before it ever be stale (a database without SQLite's lock), the update still is not."""
    honest = aliases.read
    stale = aliases.Alias("base", "champion", line[0].digest, 1)
    move(store, "champion", line[1], 1)
    answers = iter([stale])
    monkeypatch.setattr(aliases, "read", lambda *key: next(answers, None) or honest(*key))
    with pytest.raises(StateMoved, match="from v1 to v2"):
        move(store, "champion", line[2], 1)


def test_of_two_processes_exactly_one_wins_every_round(store, line):
    """20 rounds; both are given the same revision, each its own version, and told to go at once."""
    script = str(Path(__file__).with_name("race.py"))
    racers = [
        subprocess.Popen(
            [sys.executable, script, store.root, actor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for actor in ("kim", "lee")
    ]
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        labels, now = {entry.digest: f"v{entry.number}" for entry in line}, line[0].digest
        for revision in range(1, 21):
            targets = [entry.digest for entry in line if entry.digest != now][:2]
            for racer, target in zip(racers, targets, strict=True):
                racer.stdin.write(f"{revision} {target}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers]
            winner = answers.index("won")
            moved = f"the champion moved from {labels[now]} to {labels[targets[winner]]}"
            assert answers[1 - winner].startswith(f"lost {moved}")
            now = targets[winner]
    finally:
        for racer in racers:
            racer.communicate()
    with store.database.read() as connection:
        history = aliases.history(connection, "base", "champion")
        assert aliases.champion(connection, "base").version == now
    assert [entry.revision for entry in history] == list(range(1, 22))
    assert audit.verify(store).intact
