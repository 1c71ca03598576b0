"""Running a suite on the tiny model."""

from __future__ import annotations

import json

import pytest
from tests.engine.conftest import make_model, make_tokenizer

from meristem.engine.generate import generate
from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.engine.prompts import encode_option, encode_prompt
from meristem.engine.score import option_logprobs
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite, Task

OPTIONS = ("no", "yes please", "maybe")


@pytest.fixture(scope="module")
def engine():
    return wrap(make_model(), make_tokenizer(), EngineSettings(dtype="float32", batch_tokens=128))


def item(at, answer, options=(), slice=None):
    return Item(f"i{at}", (Message("user", f"question {at}"),), answer, options, slice)


@pytest.fixture(scope="module")
def suite(engine):
    said = generate(engine, [encode_prompt(engine, "question 0")], 4)[0].strip() or "?"
    facts = Task("facts", "generate", "exact_match", "general", (item(0, said), item(1, "never")), 4)
    asked = tuple(item(at, OPTIONS[at % 3], OPTIONS, "even" if at % 2 == 0 else None) for at in range(5))
    return Suite("s", (Task("topics", "choice", "accuracy", "target", asked), facts))


def test_choice_takes_the_best_option_and_generate_matches_exactly(engine, suite):
    results = evaluate(engine, suite)
    assert [(r["task"], r["id"]) for r in results] == [("topics", f"i{k}") for k in range(5)] + [
        ("facts", "i0"),
        ("facts", "i1"),
    ]
    for result, asked in zip(results, suite.tasks[0].items, strict=False):
        context = encode_prompt(engine, asked.chat())
        scores = option_logprobs(engine, [context], [[encode_option(engine, o) for o in OPTIONS]])[0]
        assert result["prediction"] == OPTIONS[scores.index(max(scores))]
        assert result["score"] == float(result["prediction"] == asked.answer)
        assert list(result["detail"]["logprobs"]) == list(OPTIONS)
        assert list(result["detail"]["logprobs"].values()) == pytest.approx(scores, rel=1e-5)
    assert [r["score"] for r in results[5:]] == [1.0, 0.0]
    assert results[0]["slice"] == "even"


def test_results_are_json_and_the_same_on_a_rerun(engine, suite):
    first, second = evaluate(engine, suite), evaluate(engine, suite)
    assert json.dumps(first) == json.dumps(second)
    assert json.loads(json.dumps(first)) == first


def test_progress_counts_all_items(engine, suite):
    calls = []
    evaluate(engine, suite, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (7, 7)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_item_too_long_for_the_model_is_refused(engine):
    long = Item("long", (Message("user", "x" * 300),), "a", ("a", "b"))
    with pytest.raises(BadInput, match="suite 's', task 't': item 0: 3"):
        evaluate(engine, Suite("s", (Task("t", "choice", "accuracy", "target", (long,)),)))
