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
