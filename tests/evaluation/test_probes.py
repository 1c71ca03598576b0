"""What cannot be watched, or not be a probe, is refused in one line before anything is trained."""

from __future__ import annotations

import pytest
from tests import acme
from tests.evaluation.paired import results

from meristem import ForgettingCallback
from meristem.errors import BadInput
from meristem.evaluation import probes
from meristem.evaluation.items import Item, Message
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.generate import Generate
from meristem.evaluation.tasks.harness.lm_eval_task import LmEval
from meristem.evaluation.tasks.judge import JudgeSettings
from meristem.evaluation.tasks.perplexity import Perplexity


@pytest.fixture
def suite(tmp_path):
    return load_suite(acme.suite_file(tmp_path / "a.yaml", "a"))


def refusal(probe, **settings):
    with pytest.raises(BadInput) as refused:
        ForgettingCallback(probe, **settings)
    [line] = str(refused.value).splitlines()
    return line


def one_task(settings, kind, **fields):
    item = Item("i", (Message("user", "?"),), "7", **fields)
    return Suite("s", (Task("t", kind, settings, "general", (item,)),))


def test_a_probe_is_a_suite_or_the_path_of_one(suite, tmp_path):
    assert ForgettingCallback(suite).probe is suite
    assert ForgettingCallback(str(tmp_path / "a.yaml")).probe == suite
    assert "probe is a suite or the path of a suite file, not dict" in refusal(suite.to_document())
    assert "no such suite file" in refusal(tmp_path / "b.yaml")
    assert "suite 'nothing' has no items" in refusal(Suite("nothing", ()))


def test_tasks_that_ask_somebody_else_are_no_probe():
    judge = JudgeSettings(url="http://127.0.0.1:9/v1", model="m", prompt="{response}", scale=[1.0, 5.0])
    judged = refusal(one_task(Generate(metric="judge", judge=judge), "generate"))
    assert judged == "suite 's', task 't': a judge is not asked during training; leave the task out"
    harness = LmEval.model_construct(metric="acc")
    assert "a harness (lm-eval) does not run inside of a training" in refusal(one_task(harness, "lm-eval"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience is a number of looks, 1 or more, or None to only watch, not 0"),
        ({"patience": 1.5}, "patience is a number of looks"),
        ({"patience": True}, "patience is a number of looks"),
        ({"every": 0}, "every is a number of steps or a share of them between 0 and 1, not 0"),
        ({"every": 1.0}, "every is a number of steps"),
        ({"every": "epoch"}, "every is a number of steps"),
        ({"alpha": 0.5}, "alpha is a chance between 0 and 0.5"),
        ({"alpha": float("nan")}, "alpha is a chance"),
        ({"alpha": 0}, "alpha is a chance"),
        ({"margin": -0.1}, "margin is a loss that is tolerated, between 0 and 1 (0.02 means two points), not -0.1"),
        ({"margin": 2}, "margin is a loss that is tolerated, between 0 and 1"),
        ({"margin": float("nan")}, "margin is a loss"),
        ({"margin": "0.1"}, "margin is a loss"),
        ({"name": ""}, "name is what the logged names begin with, not ''"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(suite, settings, message):
    assert message in refusal(suite, **settings)


def test_a_margin_is_in_the_unit_of_the_scores():
    bits = one_task(Perplexity(), "perplexity", text="some text")
    assert ForgettingCallback(bits, margin=2.5).margin == 2.5
    assert "margin is a loss that is tolerated, 0 or more, not -1" in refusal(bits, margin=-1)


def test_what_can_be_lost_is_counted_by_source():
    rows = results([1, 1, 0, 0.5, 1], clusters=["x", "x", "y", None, None])
    assert probes.can_fall(rows) == 3
    assert probes.can_fall(results([-1.0, -2.0], unit="nats")) == 2
