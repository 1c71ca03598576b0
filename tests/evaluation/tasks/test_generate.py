"""Generated text: what is read from items, how it is scored, and what is refused."""

from __future__ import annotations

import json

import pytest
from tests.evaluation.tasks.conftest import results_of, task_of

from meristem.data.jsonl import Refused
from meristem.engine.generate import generate
from meristem.engine.prompts import encode_prompt
from meristem.errors import BadInput
from meristem.evaluation.suites import Suite

QUESTIONS = ("first", "second", "third")
SAMPLED = {"samples": 4, "temperature": 1.5, "top_p": 0.9, "seed": 3, "max_new_tokens": 6}


def rows_of(*answers):
    return [{"prompt": prompt, "answer": answer} for prompt, answer in zip(QUESTIONS, answers, strict=False)]


@pytest.fixture(scope="module")
def said(engine):
    """What the model says, greedily."""
    prompts = [encode_prompt(engine, question) for question in QUESTIONS]
    return [made.text.strip() for [made] in generate(engine, prompts, max_new_tokens=8)]


def test_greedy_texts_against_their_answers(engine, said):
    rows = results_of(engine, "generate", rows_of(said[0], "never", ["no", said[2]]), max_new_tokens=8)
    assert [row["prediction"] for row in rows] == said
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.0]
    assert [row["answer"] for row in rows] == [said[0], "never", "no"]
    assert rows[0]["detail"] == {"tokens": 8, "unfinished": 1}


def test_stop_strings_end_the_text(engine, said):
    stop = said[0][3]
    [row] = results_of(engine, "generate", rows_of("x"), max_new_tokens=8, stop=[stop])
    assert row["prediction"] == said[0][: said[0].index(stop)].strip()
    assert "unfinished" not in row["detail"]


def test_extract_reads_a_part_before_the_metric(engine, said):
    [found, lost] = results_of(
        engine, "generate", rows_of(said[0][1], "x"), max_new_tokens=8, extract="^.(.)"
    )[:2]
    assert (found["score"], found["prediction"], found["detail"]["read"]) == (1.0, said[0], said[0][1])
    [lost] = results_of(engine, "generate", rows_of("x"), max_new_tokens=8, extract="[0-9]{30}")
    assert (lost["score"], lost["detail"]["read"]) == (0.0, None)


def test_numbers_that_were_read_are_told(engine):
    [row] = results_of(engine, "generate", rows_of(5), metric="numeric", tolerance=1e9, max_new_tokens=1)
    assert row["detail"]["read"] is None
    assert row["score"] == 0.0


def test_samples_score_their_mean_and_follow_the_seed(engine):
    prompt = [encode_prompt(engine, QUESTIONS[0])]
    settings = {**SAMPLED, "max_new_tokens": 6}
    [made] = generate(engine, prompt, **settings)
    texts = [one.text.strip() for one in made]
    [row] = results_of(engine, "generate", rows_of(texts[1]), **settings)
    scores = [float(text == texts[1]) for text in texts]
    assert row["detail"]["samples"] == [
        {"text": text, "score": score} for text, score in zip(texts, scores, strict=True)
    ]
    assert row["score"] == sum(scores) / 4 < 1
    assert row["prediction"] == texts[0]
    assert row["detail"]["tokens"] == sum(one.tokens for one in made)
    [other] = results_of(engine, "generate", rows_of("x"), **{**settings, "seed": 4})
    assert [s["text"] for s in other["detail"]["samples"]] != texts
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_prompt_is_refused_or_cut_on_the_declared_side(engine, side):
    rows = [{"prompt": "x" * 300, "answer": "y"}]
    with pytest.raises(
        BadInput, match=r"suite 's', task 't': item 'i0': 3\d\d tokens, but there is room for 248"
    ):
        results_of(engine, "generate", rows, max_new_tokens=8)
    [row] = results_of(engine, "generate", rows, {"truncation": side}, max_new_tokens=8)
    tokens = encode_prompt(engine, "x" * 300)
    assert row["detail"]["truncated"] == len(tokens) - 248
    fed = tokens[-248:] if side == "left" else tokens[:248]
    assert row["prediction"] == generate(engine, [fed], max_new_tokens=8)[0][0].text.strip()


def test_broken_weights_are_named_not_scored():
    from tests.engine.conftest import make_model, make_tokenizer

    from meristem.engine.identity import EngineSettings
    from meristem.engine.load import wrap

    model = make_model()
    model.lm_head.weight.data[5] = float("nan")
    broken = wrap(model, make_tokenizer(), EngineSettings(dtype="float32"))
    choice = [{"prompt": "p", "answer": "a", "options": ["a", "b"]}]
    for kind, rows in (
        ("generate", rows_of("x")),
        ("choice", choice),
        ("perplexity", [{"text": "abc"}]),
        ("preference", [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
    ):
        with pytest.raises(BadInput, match=r"task 't': .*not finite; the model is damaged"):
            results_of(broken, kind, rows)


ANSWERS = [
    ("exact_match", 4, "4", ()),
    ("exact_match", ["a", "b", "a"], "a", ("b",)),
    ("numeric", 0.5, "0.5", ()),
    ("numeric", ["1,000", -3], "1,000", ("-3",)),
    ("json", {"b": 1, "a": "é"}, '{"a": "é", "b": 1}', ()),
    ("json", [{"a": 1}, {"a": 2}], '{"a": 1}', ('{"a": 2}',)),
    ("regex", ["^a", "b$"], "^a", ("b$",)),
]


@pytest.mark.parametrize(("metric", "answer", "first", "others"), ANSWERS)
def test_answers_as_they_are_written(metric, answer, first, others):
    task = task_of("generate", rows_of(answer), metric=metric)
    assert (task.items[0].answer, task.items[0].references) == (first, others)
    suite = Suite("s", (task,))
    assert Suite.from_document(json.loads(json.dumps(suite.to_document()))) == suite


BAD_ANSWERS = [
    ("exact_match", None, '"answer" must be'),
    ("exact_match", True, "true can be written in several ways"),
    ("exact_match", 1.5, "1.5 can be written in several ways"),
    ("exact_match", [], "an empty list"),
    ("exact_match", ["a", " "], '"answer" must be'),
    ("exact_match", {"a": 1}, '"answer" must be'),
    ("numeric", "about 5", "'about 5' is not one number"),
    ("numeric", ["1", "two"], "'two' is not one number"),
    ("json", '{"a": 1}', "must be a JSON object"),
    ("json", {}, "at least one field"),
    ("regex", ["a", "("], "the pattern '(' cannot be read: missing ) at position 1"),
    ("regex", "(?u)a(?L)b", "the pattern '(?u)a(?L)b' cannot be read: ASCII, LOCALE and UNICODE flags"),
]


@pytest.mark.parametrize("metric", ["contains", "exact_match"])
@pytest.mark.parametrize(("answer", "rule"), [("The", "normalize"), ("?!", "ignore_punctuation")])
def test_an_answer_of_which_nothing_is_left_is_refused(metric, answer, rule):
    """It would stand in every text."""
    with pytest.raises(Refused, match="nothing is left to compare"):
        task_of("generate", rows_of(["fine", answer]), metric=metric, **{rule: True})
    task_of("generate", rows_of(answer), metric=metric)


@pytest.mark.parametrize(("metric", "answer", "message"), BAD_ANSWERS)
def test_answers_that_are_refused(metric, answer, message):
    with pytest.raises(Refused) as caught:
        task_of("generate", rows_of(answer), metric=metric)
    assert message in str(caught.value)


BAD_SETTINGS = [
    ({"metric": "bleu"}, "metric"),
    ({"tolerance": 0.1}, "tolerance belongs to the metric numeric, not exact_match"),
    (
        {"metric": "numeric", "normalize": True},
        "normalize belongs to the metric contains or exact_match or json",
    ),
    ({"metric": "judge"}, "needs judge"),
    ({"samples": 4}, "samples: greedy texts are all the same"),
    ({"seed": 1}, "seed: greedy texts"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
    ({"stop": ["a", ""]}, "empty stop string"),
    ({"extract": "(a"}, "the pattern '(a' cannot be read: missing ) at position 2"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"metric": "numeric", "tolerance": float("inf")}, "tolerance"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        task_of("generate", rows_of("a"), **settings)
    assert message in str(caught.value)


def test_rouge_needs_its_package(monkeypatch, engine):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"task 't': the metric rouge_l needs rouge-score; pip install"):
        results_of(engine, "generate", rows_of("x"), metric="rouge_l")


def test_a_pattern_that_explodes_names_its_item(engine, monkeypatch):
    monkeypatch.setattr("meristem.evaluation.tasks.matching.PATTERN_SECONDS", 0.0)
    with pytest.raises(BadInput, match=r"task 't': item 'i0': the pattern .* took more than 0 s"):
        results_of(engine, "generate", rows_of("(.*.*)*=="), metric="regex", max_new_tokens=30)
