"""Methods as they are spelled, runs and their names, and what a result file refuses."""

from __future__ import annotations

import json

import pytest
from tests.bench import tiny_stream

from meristem.bench import results
from meristem.bench.lineup import Conditions, read_method, runs
from meristem.errors import BadInput


def conditions(content="sha256:" + "a" * 64, words=None, development=False):
    class Given:
        def __init__(self, name):
            self.name = name

        def to_document(self):
            return {"train": f"sha256:{self.name}", "train_rows": 16, "test_items": 10}

    materials = {name: Given(name) for name in ("red", "blue")}
    return Conditions(
        tiny_stream.TINY,
        materials,
        "tiny",
        content,
        words,
        {"dtype": "float32"},
        {"torch": "1"},
        development,
    )


def lineup(*specs, seeds=(0,), orders=("1", "2"), **given):
    chosen = {name: tiny_stream.ORDERS[name] for name in orders}
    return runs(conditions(**given), [read_method(spec, "cit") for spec in specs], chosen, seeds, {})


def test_one_method_has_one_spelling():
    """Arguments in order and numbers short, so that nothing is trained twice under two names."""
    spellings = ("ewc:strength=50,samples=8", " ewc:samples=8.0, strength=5e+1")
    assert {read_method(text, "cit").spec for text in spellings} == {"ewc:samples=8,strength=50"}
    both = read_method("experience-replay:ratio=0.30+ewc:strength=1e+2", "cit")
    assert both.spec == "experience-replay:ratio=0.3+ewc:strength=100"
    assert [m["name"] for m in both.methods] == ["experience-replay", "ewc"]
    assert both.methods[1]["arguments"]["strength"] == 100.0
    assert both.slug == "experience-replay_ratio=0.3+ewc_strength=100"


def test_the_baselines_among_the_methods_are_the_ones_of_the_bench():
    """Results keep their names, and nothing is trained twice."""
    assert read_method("seq-finetune", "cit") == read_method("sequential", "cit")
    for name in ("per-task", "joint"):
        assert read_method(name, "cit").methods == () and not read_method(name, "cit").follows_an_order
    with pytest.raises(BadInput, match="sequential is a baseline and goes with no other method"):
        read_method("seq-finetune+ewc", "cit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ewx", "there is no method 'ewx': did you mean 'ewc'"),
        ("ewc:strenght=1", "method 'ewc' has no argument 'strenght'"),
        ("sequential+ewc", "sequential is a baseline and goes with no other method"),
        ("", "there is no method ''"),
    ],
)
def test_unknown_methods_are_named(text, message):
    with pytest.raises(BadInput, match=message):
        read_method(text, "cit")


def test_a_method_that_does_not_work_in_the_stage_is_refused():
    with pytest.raises(BadInput, match="method ewc works in stages cit, cpt, not in ca"):
        read_method("ewc", "ca")


def test_bounds_run_once_whatever_the_orders():
    found = lineup("sequential", "per-task", "joint", seeds=(0, 1))
    assert [run.name for run in found] == [
        "tiny-2-1-sequential-seed0",
        "tiny-2-any-per-task-seed0",
        "tiny-2-any-joint-seed0",
        "tiny-2-2-sequential-seed0",
        "tiny-2-1-sequential-seed1",
        "tiny-2-any-per-task-seed1",
        "tiny-2-any-joint-seed1",
        "tiny-2-2-sequential-seed1",
    ]
    assert [found[0].tasks, found[1].tasks, found[3].tasks] == [
        ("red", "blue"),
        ("red", "blue"),
        ("blue", "red"),
    ]
    assert len({run.line for run in found}) == len(found)
    assert all(len(run.line) <= 64 for run in found) and found[4].recipe.seed == 1


def test_other_settings_under_a_name_are_refused(tmp_path):
    [run] = lineup("sequential", orders=("1",))
    assert results.find(tmp_path, run) is None
    path = results.write(tmp_path, run, {"acc": 0.5})
    assert results.find(tmp_path, run)["acc"] == 0.5
    [unknown] = lineup("sequential", orders=("1",), content=None)  # a model that is not in the store yet
    assert results.find(tmp_path, unknown)["acc"] == 0.5
    [other] = lineup("sequential", orders=("1",), words=9, content="sha256:" + "b" * 64)
    told = (
        r"seed0.json: made with other settings \(words None, now 9; model.content sha256:aaaaaaaa\.\.\., now "
    )
    with pytest.raises(BadInput, match=told):
        results.find(tmp_path, other)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "settings": {**document["settings"], "seed": 5}}))
    with pytest.raises(BadInput, match="its settings do not match their digest"):
        results.find(tmp_path, run)
    path.write_text('{"schema": "meristem/bench-re')
    with pytest.raises(BadInput, match="not a readable result file; delete it"):
        results.find(tmp_path, run)
