import json
from collections import Counter

import pytest
from scipy.stats import chisquare

from meristem.errors import BadInput
from meristem.methods.replay.buffers import BUFFERS, ReservoirBuffer, TaskBalancedBuffer


def rows(task, count):
    return [{"id": f"{task}-{n}", "task": task, "text": f"{task} {n}"} for n in range(count)]


def test_a_reservoir_holds_every_row_of_the_stream_equally_often():
    counts = Counter()
    for seed in range(2000):
        buffer = ReservoirBuffer(5, seed)
        buffer.add(rows("a", 40))
        held = [row["id"] for row in buffer.rows()]
        assert len(held) == len(set(held)) == 5
        counts.update(held)
    assert chisquare([counts[f"a-{n}"] for n in range(40)]).pvalue > 0.001


def test_a_task_stays_a_uniform_sample_after_its_share_shrinks():
    counts = Counter()
    for seed in range(1500):
        buffer = TaskBalancedBuffer(12, seed)
        for task in "abc":
            buffer.add(rows(task, 30))
        counts.update(row["id"] for row in buffer.rows())
    for task in "abc":
        assert chisquare([counts[f"{task}-{n}"] for n in range(30)]).pvalue > 0.001


@pytest.mark.parametrize(("capacity", "shares"), [(9, [3, 3, 3]), (11, [4, 4, 3]), (2, [1, 1, 0])])
def test_shares_are_equal_and_fill_the_capacity(capacity, shares):
    buffer = TaskBalancedBuffer(capacity)
    for task, count in (("a", 500), ("b", 30), ("c", 200)):
        buffer.add(rows(task, count))
        assert len(buffer.rows()) <= capacity
    held = Counter(row["task"] for row in buffer.rows())
    assert [held[task] for task in "abc"] == shares


@pytest.mark.parametrize("kind", list(BUFFERS))
def test_state_is_json_and_a_restored_buffer_goes_on_the_same(kind):
    whole, first = BUFFERS[kind](7, 3), BUFFERS[kind](7, 3)
    whole.add(rows("b", 50) + rows("a", 50))
    first.add(rows("b", 50) + rows("a", 10))
    second = BUFFERS[kind](7, 3)
    second.load(json.loads(json.dumps(first.state(), sort_keys=True)))
    second.add(rows("a", 50)[10:])
    assert second.rows() == whole.rows() and second.state() == whole.state()


def held_after_reload(kind, before, after, seen, more):
    """How often each row is held over many seeds: ``seen`` rows, then ``more`` with another capacity."""
    counts = Counter()
    for seed in range(2000):
        first, second = BUFFERS[kind](before, seed), BUFFERS[kind](after, seed)
        first.add(rows("a", seen))
        second.load(json.loads(json.dumps(first.state())))
        second.add(rows("a", seen + more)[seen:])
        counts.update(row["id"] for row in second.rows())
    return [counts[f"a-{n}"] for n in range(seen + more)]


@pytest.mark.parametrize("kind", list(BUFFERS))
@pytest.mark.parametrize(("seen", "more"), [(30, 0), (30, 12), (9, 0), (9, 12)])
def test_a_smaller_capacity_keeps_a_uniform_sample(kind, seen, more):
    counts = held_after_reload(kind, 10, 4, seen, more)
    assert sum(counts) == 2000 * 4 and chisquare(counts).pvalue > 0.001


def test_a_reservoir_that_dropped_rows_cannot_grow_and_one_that_did_not_can():
    first = ReservoirBuffer(4)
    first.add(rows("a", 4))
    second = ReservoirBuffer(6)
    second.load(first.state())
    second.add(rows("a", 9)[4:])
    assert len(second.rows()) == 6
    with pytest.raises(BadInput, match="kept 6 of 9 rows and cannot grow to capacity=7: keep capacity=6"):
        ReservoirBuffer(7).load(second.state())


def test_a_larger_share_stays_uniform_and_leaves_room_for_tasks_to_come():
    counts = held_after_reload("task-balanced", 4, 20, 10, 5)
    assert sum(counts) == 2000 * 4 and chisquare(counts).pvalue > 0.001
    first, second = TaskBalancedBuffer(4), TaskBalancedBuffer(20)
    first.add(rows("a", 10))
    second.load(first.state())
    second.add(rows("b", 30))
    assert Counter(row["task"] for row in second.rows()) == {"a": 4, "b": 10}


@pytest.mark.parametrize("kind", list(BUFFERS))
def test_a_row_can_be_forgotten(kind):
    buffer = BUFFERS[kind](7)
    buffer.add(rows("a", 5))
    assert buffer.discard(["a-2", "a-9"]) == 1
    assert "a-2" not in {row["id"] for row in buffer.rows()} and len(buffer.rows()) == 4


def test_rows_are_copies_and_need_id_and_task():
    buffer = ReservoirBuffer(3)
    row = {"id": "1", "task": "a", "text": "x"}
    buffer.add([row])
    row["text"] = "changed"
    buffer.rows()[0]["text"] = "changed too"
    assert buffer.rows()[0]["text"] == "x"
    with pytest.raises(BadInput, match="'id' and 'task'"):
        buffer.add([{"id": "1"}])


def test_the_state_of_another_kind_of_buffer_is_refused():
    with pytest.raises(BadInput, match="reservoir"):
        TaskBalancedBuffer(3).load(ReservoirBuffer(3).state())
