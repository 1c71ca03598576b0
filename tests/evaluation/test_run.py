"""Running a suite on the tiny model."""

from __future__ import annotations

import json

import pytest
from tests.engine.conftest import make_model, make_tokenizer

from meristem.engine.generate import generate
from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.engine.prompts import encode_prompt
from meristem.engine.score import score_options
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.choice import Choice
from meristem.evaluation.tasks.generate import Generate

OPTIONS = ("no", "yes please", "maybe")


@pytest.fixture(scope="module")
def engine():
    return wrap(make_model(), make_tokenizer(), EngineSettings(dtype="float32", batch_tokens=128))


def logprobs(engine, context, options):
    """Of each option after ``context``; a chat template's prompt ends where an answer begins."""
    tokens = [engine.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    return [score.logprob for score in score_options(engine, [context], [tokens])[0]]


def item(at, answer, options=(), **more):
    return Item(f"i{at}", (Message("user", f"question {at}"),), answer, options, **more)


def topics(count=5, **task):
    asked = (item(at, OPTIONS[at % 3], OPTIONS, slice=None if at % 2 else "even") for at in range(count))
    return Task("topics", "choice", Choice(), "target", tuple(asked), **task)


@pytest.fixture(scope="module")
def suite(engine):
    [[made]] = generate(engine, [encode_prompt(engine, "question 0")], max_new_tokens=4)
    items = (item(0, made.text.strip() or "?"), item(1, "never", cluster="c"))
    return Suite("s", (topics(), Task("facts", "generate", Generate(max_new_tokens=4), "general", items)))


def test_choice_takes_the_best_option_and_generate_matches_exactly(engine, suite):
    results = evaluate(engine, suite)
    assert [(r["task"], r["id"]) for r in results] == [("topics", f"i{k}") for k in range(5)] + [
        ("facts", "i0"),
        ("facts", "i1"),
    ]
    for result, asked in zip(results, suite.tasks[0].items, strict=False):
        context = encode_prompt(engine, asked.chat())
        scores = logprobs(engine, context, OPTIONS)
        assert result["prediction"] == OPTIONS[scores.index(max(scores))]
        assert result["score"] == float(result["prediction"] == asked.answer)
        assert list(result["detail"]["logprobs"]) == list(OPTIONS)
        assert list(result["detail"]["logprobs"].values()) == pytest.approx(scores, rel=1e-5)
    assert [r["score"] for r in results[5:]] == [1.0, 0.0]
    assert results[0]["slice"] == "even"


def test_rows_say_what_differs_from_the_usual_only(engine, suite):
    rows = evaluate(engine, suite)
    usual = {"task", "id", "slice", "score", "prediction", "answer", "detail"}
    assert [set(row) - usual for row in rows] == [set()] * 6 + [{"cluster"}]


def test_results_are_json_and_the_same_on_a_rerun(engine, suite):
    first, second = evaluate(engine, suite), evaluate(engine, suite)
    assert json.dumps(first) == json.dumps(second)
    assert json.loads(json.dumps(first)) == first


def test_progress_counts_all_items(engine, suite):
    calls = []
    evaluate(engine, suite, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (7, 7)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_item_too_long_for_the_model_is_refused_or_cut_as_the_task_says(engine):
    long = Item("long", (Message("user", "x" * 300),), "a", ("a", "bcd"))
    with pytest.raises(
        BadInput, match=r"suite 's', task 't': item 'long': 3\d\d tokens, but there is room for 254"
    ):
        evaluate(engine, Suite("s", (Task("t", "choice", Choice(), "target", (long,)),)))
    tokens = encode_prompt(engine, long.chat())
    for side, fed in (("left", tokens[-254:]), ("right", tokens[:254])):
        task = Task("t", "choice", Choice(), "target", (long, item(0, "a", ("a", "b"))), truncation=side)
        cut, whole = evaluate(engine, Suite("s", (task,)))
        scores = logprobs(engine, fed, long.options)
        assert list(cut["detail"]["logprobs"].values()) == pytest.approx(scores, rel=1e-5)
        assert cut["detail"]["truncated"] == len(tokens) - 254
        assert "truncated" not in whole["detail"]


def test_format_and_worked_examples_change_what_the_model_reads(engine):
    shots = (Message("user", "question 9"), Message("assistant", "maybe"))
    told = [
        evaluate(engine, Suite("s", (topics(2, **more),)))
        for more in ({}, {"format": "text"}, {"shots": shots})
    ]
    values = [rows[0]["detail"]["logprobs"]["no"] for rows in told]
    assert len(set(values)) == 3
    shown = [*(shot.to_document() for shot in shots), {"role": "user", "content": "question 0"}]
    [score] = logprobs(engine, encode_prompt(engine, shown), ["no"])
    assert values[2] == pytest.approx(score, rel=1e-5)


def test_unconditional_scoring_takes_out_how_likely_an_option_is_by_itself(engine):
    task = Task("t", "choice", Choice(scoring="unconditional"), "target", topics(2).items)
    plain = evaluate(engine, Suite("s", (topics(2),)))
    for row, before in zip(evaluate(engine, Suite("s", (task,))), plain, strict=True):
        empty = encode_prompt(engine, [{"role": "user", "content": ""}])
        prior = logprobs(engine, empty, OPTIONS)
        assert list(row["detail"]["unconditional"].values()) == pytest.approx(prior, rel=1e-5)
        assert row["detail"]["logprobs"] == before["detail"]["logprobs"]
        margins = [value - p for value, p in zip(row["detail"]["logprobs"].values(), prior, strict=True)]
        assert row["prediction"] == OPTIONS[margins.index(max(margins))]


def test_unconditional_scoring_of_plain_text_starts_from_the_first_condition(engine):
    """The tokenizer puts no token before a text, so an empty question has none."""
    task = Task("t", "choice", Choice(scoring="unconditional"), "target", topics(1).items, format="text")
    [row] = evaluate(engine, Suite("s", (task,)))
    prior = logprobs(engine, [engine.tokenizer.eos_token_id], [f" {option}" for option in OPTIONS])
    assert list(row["detail"]["unconditional"].values()) == pytest.approx(prior, rel=1e-5)


def test_length_normalised_scoring_divides_by_characters(engine):
    task = Task("t", "choice", Choice(scoring="length"), "target", topics(3).items)
    for row in evaluate(engine, Suite("s", (task,))):
        per = {option: value / len(option) for option, value in row["detail"]["logprobs"].items()}
        assert row["prediction"] == max(per, key=per.__getitem__)
