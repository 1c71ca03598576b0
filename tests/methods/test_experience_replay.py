import json

import pytest

from meristem.errors import BadInput
from meristem.methods import Context, ExperienceReplay


def rows(task, count, key="text"):
    return [{"id": f"{task}-{n}", "task": task, key: f"{task} {n}"} for n in range(count)]


def test_ratio_is_the_share_of_replayed_rows_in_the_mixed_set():
    method = ExperienceReplay(ratio=0.25, capacity=50)
    ctx = Context("new", history={"a": rows("a", 80), "b": rows("b", 80)}, rows=rows("new", 90))
    mixed = method.prepare_data(ctx.rows, ctx)
    old = [row for row in mixed if row["task"] != "new"]
    assert len(mixed) == 120 and len(old) == 30 and len({row["id"] for row in old}) == 30
    assert sorted(r["id"] for r in mixed if r["task"] == "new") == sorted(r["id"] for r in ctx.rows)
    assert all(row["id"].startswith(row["task"]) for row in mixed)
    again = ExperienceReplay(ratio=0.25, capacity=50)
    assert again.prepare_data(ctx.rows, ctx) == mixed


def test_a_small_buffer_is_passed_over_again():
    method = ExperienceReplay(ratio=0.5)
    ctx = Context("new", history={"a": rows("a", 4)}, rows=rows("new", 10))
    old = [row["id"] for row in method.prepare_data(ctx.rows, ctx) if row["task"] == "a"]
    assert len(old) == 10 and {old.count(f"a-{n}") for n in range(4)} == {2, 3}


def test_without_earlier_rows_nothing_changes():
    ctx = Context("new", rows=rows("new", 3))
    assert ExperienceReplay().prepare_data(ctx.rows, ctx) is ctx.rows
    assert ExperienceReplay(ratio=0).prepare_data([], ctx) == []


def test_saved_state_wins_over_history_and_new_rows_enter_at_the_end():
    first = ExperienceReplay(ratio=0.5, capacity=10)
    ctx = Context("a", rows=rows("a", 30))
    first.prepare_data(ctx.rows, ctx)
    assert first.state_dict()["json"]["buffer"]["rows"] == []
    first.finish(ctx)
    second = ExperienceReplay(ratio=0.5, capacity=10)
    second.load_state_dict({"tensors": {}, "json": json.loads(json.dumps(first.state_dict()["json"]))})
    ctx = Context("b", rows=rows("b", 8), history={"a": rows("other", 99)})
    assert {row["task"] for row in second.prepare_data(ctx.rows, ctx)} == {"a", "b"}
    second.finish(ctx)
    assert [r["task"] for r in second.buffer.rows()].count("b") == 5


def test_rows_of_another_format_are_refused_by_id():
    method = ExperienceReplay()
    ctx = Context("new", history={"a": rows("a", 3, key="prompt")}, rows=rows("new", 3))
    with pytest.raises(BadInput, match=r"kept row 'a-0' of task 'a' has \['prompt'\]"):
        method.prepare_data(ctx.rows, ctx)
