"""Best-known settings: the files beside the methods, how they are chosen, and how they are taken."""

from __future__ import annotations

import copy
import json

import pytest
import yaml
from benchmarks import method_settings
from tests.bench import tiny_stream
from tests.bench.test_lineup import conditions

from meristem.bench.lineup import read_method, runs
from meristem.errors import BadInput
from meristem.methods import available, build, parse, settings
from meristem.methods.settings import RULE, MethodSettings, best_known, path_of

KNOWN = [name for name in available() if path_of(name).is_file()]


@pytest.mark.parametrize("name", KNOWN)
def test_each_file_is_read_and_its_choice_is_the_best_that_was_tried(name):
    found = best_known(name)
    assert found.found.rule == RULE and found.method == name
    assert build(name, found.arguments).arguments() == found.arguments  # every argument stands there
    assert parse(found.found.best.method).arguments() == found.arguments
    assert parse(f"{name}:best").arguments() == found.arguments
    again = method_settings.text_of(found)
    assert path_of(name).read_text(encoding="utf-8") == again  # nobody wrote it by hand


def test_there_are_some():
    assert "ewc" in KNOWN


def test_best_is_taken_whole_or_but_one():
    known = best_known("ewc").arguments
    assert parse("ewc:best,gamma=0.5").arguments() == {**known, "gamma": 0.5}
    spec = read_method("ewc:best", "cit")
    assert spec.methods == ({"name": "ewc", "arguments": known},)
    assert (
        spec.spec == f"ewc:gamma={known['gamma']:g},samples={known['samples']},strength={known['strength']:g}"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "meristem/method-settings/v2"}, "not a meristem/method-settings/v1 file"),
        ({"extra": 1}, "not a meristem/method-settings/v1 file"),
        ({"method": "gpm"}, "settings of 'gpm' beside the method 'ewc'"),
        (None, "not a meristem/method-settings/v1 file"),
    ],
)
def test_a_damaged_file_is_named(change, says, tmp_path, monkeypatch):
    path = tmp_path / "ewc.settings.yaml"
    document = best_known("ewc").to_document()
    path.write_text(yaml.safe_dump({**document, **change}) if change else "{")
    monkeypatch.setattr(settings, "path_of", lambda name: path)
    with pytest.raises(BadInput, match=says) as caught:
        parse("ewc:best")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def results(*specs, seeds=(0,), development=True):
    """Results as `bench run` writes them; ``specs`` with their ACC and BWT."""
    given = conditions(development=development)
    chosen = {"1": tiny_stream.ORDERS["1"]}
    made = runs(given, [read_method(spec, "cit") for spec, _, _ in specs], chosen, seeds, {})
    scores = {read_method(spec, "cit").spec: (acc, bwt) for spec, acc, bwt in specs}
    found = []
    for run in made:
        acc, bwt = scores[run.method.spec]
        one = {"name": run.name, "method": run.method.spec, "order": run.order, "seed": run.seed}
        found.append({**one, "tasks": list(run.tasks), "acc": acc, "bwt": bwt, "settings": run.settings})
    return json.loads(json.dumps(found))


def test_the_highest_acc_is_chosen_and_a_tie_by_bwt():
    found = results(
        ("sequential", 0.4, -0.3),
        ("ewc:strength=1", 0.6, -0.2),
        ("ewc:strength=10", 0.7, -0.2),
        ("ewc:strength=100", 0.7, -0.1),
        ("lae", 0.5, 0.0),
        ("lae:decay=0.9", 0.4, 0.0),
        ("gpm", 0.9, 0.0),
        ("lae+ewc", 0.9, 0.0),
        seeds=(0, 1),
    )
    ewc, lae = method_settings.settings_of(found)  # one trial of gpm chooses nothing
    assert ewc.arguments == {"strength": 100, "samples": 64, "gamma": 1.0} and ewc.found.seeds == [0, 1]
    assert [(t.method, t.acc) for t in ewc.found.tried] == [
        ("ewc:strength=1", 0.6),
        ("ewc:strength=10", 0.7),
        ("ewc:strength=100", 0.7),
    ]
    assert lae.arguments == {"decay": 0.99, "serve": "mean"} and ewc.found.sequential.bwt == -0.3
    assert "--dev" in ewc.found.command and "--seeds 0,1" in ewc.found.command
    assert MethodSettings.model_validate(yaml.safe_load(method_settings.text_of(ewc))) == ewc


def test_runs_that_must_not_choose_are_refused():
    one, other = results(("ewc", 0.5, 0.0)), results(("lae", 0.5, 0.0), seeds=(1,))
    with pytest.raises(BadInput, match="measured on test items; settings are chosen with `bench run --dev`"):
        method_settings.settings_of(results(("ewc", 0.5, 0.0), development=False))
    with pytest.raises(BadInput, match="lae: other seeds than ewc"):
        method_settings.settings_of([*one, *other])
    changed = copy.deepcopy(results(("lae", 0.5, 0.0)))
    changed[0]["settings"]["recipe"]["max_steps"] = 7
    with pytest.raises(BadInput, match="2 groups of runs under different conditions"):
        method_settings.settings_of([*one, *changed])
