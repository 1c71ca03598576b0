"""Metrics of text against values worked out by hand and against the packages that define them."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.tasks.matching import (
    METRICS,
    TextRules,
    compiled,
    extracted,
    numbers,
    search,
    squad_normalized,
)

BY_HAND = [
    # metric, text, answer, rules, score
    ("exact_match", " Paris\n", "Paris", {}, 1),
    ("exact_match", "paris", "Paris", {}, 0),
    ("exact_match", "paris", "Paris", {"ignore_case": True}, 1),
    ("exact_match", "Paris!", "Paris", {"ignore_punctuation": True}, 1),
    ("exact_match", "The  Eiffel-Tower.", "eiffeltower", {"normalize": True}, 1),
    ("contains", "It is Paris, France.", "Paris", {}, 1),
    ("contains", "It is paris", "Paris", {}, 0),
    ("contains", "the  answer is a B", "answer is B", {"normalize": True}, 1),
    ("regex", "Order 4711 shipped", r"\b\d{4}\b", {}, 1),
    ("regex", "YES", "^yes$", {}, 0),
    ("regex", "YES", "^yes$", {"ignore_case": True}, 1),
    ("numeric", "So 3 + 4 = 7.", "7", {}, 1),
    ("numeric", "It costs $1,234.50", "1234.5", {}, 1),
    ("numeric", "1'000 or 1\u202f000", "1000", {}, 1),
    ("numeric", "temperature −3.5 °C", "-3.5", {}, 1),
    ("numeric", "between 5-10", "10", {}, 1),
    ("numeric", "0.1", "0.10", {}, 1),
    ("numeric", "2.5e3", "2500", {}, 1),
    ("numeric", "3.15", "3.14", {"tolerance": 0.01}, 1),
    ("numeric", "3.16", "3.14", {"tolerance": 0.01}, 0),
    ("numeric", "no number", "0", {}, 0),
    ("json", '{"a": 1, "b": "x", "more": 0}', '{"a": 1.0, "b": "x"}', {}, 1),
    ("json", '{"a": true, "b": "x"}', '{"a": 1, "b": "x"}', {}, 0.5),
    ("json", '{"a": [1, {"c": "X"}]}', '{"a": [1, {"c": "x"}]}', {"ignore_case": True}, 1),
    ("json", '{"a": [1, 2]}', '{"a": [1]}', {}, 0),
    ("json", '{"a": null}', '{"a": null, "b": null}', {}, 0.5),
    ("json", 'Here:\n```json\n{"a": 1}\n```\nDone.', '{"a": 1}', {}, 1),
    ("json", "{'a': 1}", '{"a": 1}', {}, 0),
    ("json", "[1]", '{"a": 1}', {}, 0),
    ("json", "[" * 100_000, '{"a": 1}', {}, 0),
    # SQuAD: 2 of 3 words right, 2 of 4 found: F1 = 2 * (2/3 * 2/4) / (2/3 + 2/4) = 4/7
    ("token_f1", "the red fox runs", "Red fox jumps far", {}, 4 / 7),
    ("token_f1", "a a b", "a b b", {}, 2 / 3),  # "a" is an article: "b" against "b b"
    ("token_f1", "the", "an", {}, 1),  # nothing is left of both: as SQuAD 2.0 has it
    ("token_f1", "the", "cat", {}, 0),
    # Lin (2004), section 2.2: "police killed the gunman" and "police kill the gunman" share "police the gunman"
    ("rouge_l", "police kill the gunman", "police killed the gunman", {}, 0.75),
    ("rouge_l", "the gunman kill police", "police killed the gunman", {}, 0.5),
    ("rouge_l", "", "police", {}, 0),
]


@pytest.mark.parametrize(("metric", "text", "answer", "rules", "score"), BY_HAND)
def test_values_by_hand(metric, text, answer, rules, score):
    assert METRICS[metric](text, answer, TextRules(**rules)) == pytest.approx(score)


words = st.lists(st.sampled_from(["the", "a", "Red", "red!", "fox", "x-y", "1", "és"]), max_size=6).map(
    " ".join
)


@settings(max_examples=100, deadline=None)
@given(words, words)
def test_token_f1_and_normalisation_are_those_of_squad(text, answer):
    theirs = pytest.importorskip("lm_eval.tasks.qasper.metrics")  # SQuAD's official script, copied
    assert squad_normalized(text) == theirs.normalize_answer(text)
    if squad_normalized(text) or squad_normalized(answer):
        assert METRICS["token_f1"](text, answer, TextRules()) == pytest.approx(
            theirs.f1_abstractive([text], [answer])
        )


@settings(max_examples=50, deadline=None)
@given(words, words)
def test_rouge_l_is_that_of_the_package(text, answer):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(target=answer, prediction=text)
    assert METRICS["rouge_l"](text, answer, TextRules()) == theirs["rougeL"].fmeasure


@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_read_as_it_is_written(number):
    assert numbers(f"so {number}.") == numbers(f"so {number:,}.") == [Decimal(number)]


def test_numbers_of_any_size_are_no_trap():
    assert METRICS["numeric"]("9e9999", "1", TextRules(tolerance=1.0)) == 0
    assert METRICS["numeric"]("9" * 5000, "1", TextRules()) == 0
    assert numbers("1e99999")  # whatever it is read as


def test_extract_takes_the_first_group_that_matched():
    assert extracted(r"answer: (\w+)|final (\w+)", "x final B, answer: C") == "B"
    assert extracted(r"\d+", "a 12 b 13") == "12"
    assert extracted(r"\d+", "none") is None


def test_a_pattern_that_explodes_is_stopped(monkeypatch):
    monkeypatch.setattr("meristem.evaluation.tasks.matching.PATTERN_SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(BadInput, match=r"'\(x\+x\+\)\+y' took more than 0.05 s on a text of 5000"):
        search(r"(x+x+)+y", "x" * 5000)
    assert time.monotonic() - started < 5


def test_a_pattern_without_end_is_told():
    with pytest.raises(BadInput, match=r"recurs without end|took more than"):
        search("(?R)", "x")


def test_a_pattern_that_cannot_be_read_is_refused_with_its_position():
    with pytest.raises(Refused, match=r"the pattern 'a\(b' cannot be read: missing \) at position 3"):
        compiled("a(b")
