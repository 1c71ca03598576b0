"""An LLM judge behind a real OpenAI-compatible server, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import logging
import socket

import pytest
from tests.evaluation.tasks.conftest import results_of, task_of
from tests.evaluation.tasks.judges import gate, serving, teach

from meristem.errors import BadInput, EnvironmentFailure, Inconclusive
from meristem.evaluation.journal import journal_at
from meristem.evaluation.run import evaluate, prepare
from meristem.evaluation.suites import Suite
from meristem.evaluation.tasks.judge import JudgeSettings, judge_prompt

PROMPT = "{question}|{answer}|{response}"
ROWS = [{"prompt": "a?", "answer": "x"}, {"prompt": "b?", "answer": ["y", "z"]}]
SAID = ("good\nyes", "no")
GENERATE = {"metric": "judge", "max_new_tokens": 3}
KEY = "sk-very-secret-4711"


def settings(**changed):
    given = {
        "url": "http://127.0.0.1:9/v1",
        "model": "m",
        "prompt": PROMPT,
        "choices": {"Yes": 1.0, "no": 0.25},
        "retries": 1,
        "timeout": 20.0,
    }
    return {key: value for key, value in {**given, **changed}.items() if value is not None}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("meristem.evaluation.tasks.judge_client.FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def model(engine, tmp_path_factory):
    """The judge's folder: taught to judge what the engine's greedy texts are."""
    task = task_of("generate", ROWS, max_new_tokens=3)
    made = evaluate(engine, Suite("s", (task,)))
    prompts = [
        judge_prompt(JudgeSettings(**settings()), item, row["prediction"])
        for item, row in zip(task.items, made, strict=True)
    ]
    return teach(tmp_path_factory.mktemp("judge"), dict(zip(prompts, SAID, strict=True)))


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as url:
        yield url


@pytest.fixture
def keeper(server):
    with gate(server) as found:
        yield found


@pytest.fixture
def asked(keeper, model):
    """The judge's settings through the gate."""
    return settings(url=keeper.url, model=str(model))


def test_a_real_server_judges_and_is_named(engine, asked, model, keeper):
    rows = results_of(engine, "generate", ROWS, **GENERATE, judge=asked)
    assert [row["score"] for row in rows] == [1.0, 0.25]
    assert [row["detail"]["judge"] for row in rows] == [
        {"score": 1.0, "raw": "good\nyes", "model": f"{model}@main"},
        {"score": 0.25, "raw": "no", "model": f"{model}@main"},
    ]
    [first] = [body for body in keeper.seen if body["messages"][0]["content"].startswith("a?|x|")]
    assert {key: first[key] for key in ("temperature", "seed", "max_tokens")} == {
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 64,
    }
    assert json.loads(json.dumps(rows)) == rows


def test_the_key_reaches_the_server_and_nothing_else(engine, asked, keeper, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    keeper.key = KEY
    suite = Suite("s", (task_of("generate", ROWS, **GENERATE, judge={**asked, "api_key_env": "JUDGE_KEY"}),))
    with pytest.raises(BadInput, match="the variable JUDGE_KEY holds no key"):
        prepare(suite)
    monkeypatch.setenv("JUDGE_KEY", "wrong-" + KEY)
    with pytest.raises(
        EnvironmentFailure, match=r"does not let us in .*Bearer \*\*\*\); set the key in"
    ) as caught:
        prepare(suite)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    rows = evaluate(engine, suite)
    for text in (str(caught.value), json.dumps(rows), json.dumps(suite.to_document()), caplog.text):
        assert KEY not in text


def test_a_model_that_is_not_there(asked):
    with pytest.raises(BadInput, match=r"task 't': judge other at .* refuses a first question: 4"):
        prepare(Suite("s", (task_of("generate", ROWS, **GENERATE, judge={**asked, "model": "other"}),)))


def test_an_unreachable_judge_is_refused_before_anything_is_computed(engine):
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        with pytest.raises(
            EnvironmentFailure, match=r"judge m at http://.* cannot be reached \(.*refused.*start it"
        ):
            results_of(engine, "generate", ROWS, **GENERATE, judge=settings(url=url))


def test_what_passes_is_tried_again(engine, asked, keeper):
    keeper.answers = [
        (200, {}, b"{}"),  # the first question whether it is there
        (500, {}, b"oops"),
        (429, {"retry-after": "0"}, b"later"),
        (200, {}, b"not json"),
        (200, {}, json.dumps({"choices": [{"message": {"content": ["?"]}}]}).encode()),
    ]
    judge = {**asked, "retries": 4, "concurrency": 1}
    rows = results_of(engine, "generate", ROWS[1:], **GENERATE, judge=judge)
    assert rows[0]["score"] == 0.25
    assert len(keeper.seen) == 6


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, b"<html>down</html>"), r"cannot be reached \(500 <html>down</html>; tried 2 times\)"),
        ((200, {}, b"not json"), r"its reply is no chat completion: 200 not json"),
        ((403, {}, b"go away"), r"does not let us in \(403 go away\); name the variable"),
        ((400, {}, b"no seeds here"), r"refuses the question: 400 no seeds here"),
    ],
)
def test_what_does_not_pass_ends_the_evaluation(engine, asked, keeper, answer, message):
    keeper.answers = [(200, {}, b"{}"), answer, answer]
    with pytest.raises(EnvironmentFailure, match=message):
        results_of(engine, "generate", ROWS[1:], **GENERATE, judge={**asked, "concurrency": 1})


def test_judgements_are_asked_for_once(engine, asked, keeper, tmp_path, monkeypatch):
    """A judge that fails after the first batch: the next run asks for the rest only, and gives the same rows."""
    monkeypatch.setattr("meristem.evaluation.tasks.judge.BATCH", 1)
    suite = Suite("s", (task_of("generate", ROWS, **GENERATE, judge={**asked, "retries": 0}),))
    whole = evaluate(engine, suite)
    keeper.seen.clear()

    def fail_after_one(done, total):
        if len(keeper.seen) == 2:  # one to see whether it is there, one judgement
            keeper.answers = [(500, {}, b"down")]

    with pytest.raises(EnvironmentFailure), journal_at(tmp_path / "j") as journal:
        evaluate(engine, suite, fail_after_one, journal)
    keeper.seen.clear()
    with journal_at(tmp_path / "j") as journal:
        assert json.dumps(evaluate(engine, suite, journal=journal)) == json.dumps(whole)
    assert [body["messages"][0]["content"][:2] for body in keeper.seen] == ["Sa", "b?"]


def test_unreadable_judgements_score_zero_and_are_told(engine, asked):
    judge = {**asked, "choices": {"yes": 1.0, "maybe": 0.5}, "max_unreadable": 0.5}
    rows = results_of(engine, "generate", ROWS, **GENERATE, judge=judge)
    assert [row["score"] for row in rows] == [1.0, 0.0]
    assert rows[1]["detail"]["judge"] | {"model": ""} == {
        "score": 0.0,
        "raw": "no",
        "model": "",
        "unreadable": True,
    }
    with pytest.raises(
        Inconclusive, match=r"1 of 2 judgements of .* are unreadable, for item 'i1' it said 'no'"
    ):
        results_of(engine, "generate", ROWS, **GENERATE, judge={**judge, "max_unreadable": 0.49})


def test_a_judge_that_was_mended_is_asked_again(engine, asked, keeper, tmp_path):
    """Unreadable replies are not kept: else the same command could never succeed."""
    suite = Suite("s", (task_of("generate", ROWS, **GENERATE, judge={**asked, "concurrency": 1}),))
    whole = evaluate(engine, suite)
    empty = {"model": "m", "choices": [{"message": {"content": ""}}]}
    keeper.answers = [(200, {}, b"{}"), *[(200, {}, json.dumps(empty).encode())] * 2]
    with pytest.raises(Inconclusive), journal_at(tmp_path / "j") as journal:
        evaluate(engine, suite, journal=journal)
    with journal_at(tmp_path / "j") as journal:
        assert evaluate(engine, suite, journal=journal) == whole


def test_progress_covers_both_passes(engine, asked):
    calls = []
    suite = Suite("s", (task_of("generate", ROWS, **GENERATE, judge=asked),))
    evaluate(engine, suite, lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_samples_are_judged_one_by_one(engine, asked):
    judge = {**asked, "max_unreadable": 1.0}
    [row] = results_of(
        engine, "generate", ROWS[:1], **GENERATE, samples=3, temperature=0.01, seed=1, judge=judge
    )
    assert len(row["detail"]["samples"]) == 3
    assert [one["judge"]["score"] for one in row["detail"]["samples"]] == [1.0, 1.0, 1.0]
    assert (row["score"], "judge" in row["detail"]) == (1.0, False)


SCALE = {"choices": None, "scale": [1.0, 5.0]}
READINGS = [
    (SCALE, "4", 0.75),
    (SCALE, "It is fine, 3 arguments.\nRating: 5/5", 1.0),
    (SCALE, "2 out of 5.", 0.25),
    (SCALE, "**Score: 1**\n", 0.0),
    (SCALE, "3 or 4", None),
    (SCALE, "7", None),
    (SCALE, "", None),
    ({"choices": None, "scale": [0.0, 1.0]}, "0.5", 0.5),
    ({}, "YES.", 1.0),
    ({}, "no doubt: yes", None),
    ({}, "There is no doubt.\n\nyes", 1.0),
    ({}, "yesterday, nobody", None),
    ({}, "Yes: it agrees.\nThat is why.", 1.0),
]


@pytest.mark.parametrize(("changed", "reply", "score"), READINGS)
def test_reading_a_judgement(changed, reply, score):
    assert JudgeSettings(**settings(**changed)).read(reply) == score


REFUSALS = [
    ({"url": "localhost:8000"}, "not an http"),
    ({"url": "http://me:secret@localhost/v1"}, "an address holds no key"),
    ({"url": "http://localhost/v1?key=secret"}, "an address holds no key"),
    ({"url": "http://localhost:x/v1"}, "[Pp]ort"),
    ({"url": "http://local host/v1"}, "not an http"),
    ({"prompt": "{question}"}, r"must show \{response\}"),
    ({"prompt": "{response} {other}"}, r"must show \{response\}"),
    ({"scale": [0.0, 1.0]}, "give one"),
    ({"choices": None}, "give one"),
    ({"choices": None, "scale": [2.0, 1.0]}, "2 is not below 1"),
    ({"choices": {"yes": 2.0, "no": 0.0}}, "worth 2"),
    ({"choices": {"yes": 1.0, "Yes": 0.0}}, "the same but for their case"),
    ({"api_key_env": "sk-123"}, "api_key_env"),
    ({"key": "sk-123"}, "key"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSALS)
def test_settings_that_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        JudgeSettings(**settings(**changed))


def test_what_the_judge_is_shown():
    rows = [
        {"prompt": "{a}", "answer": ["x", "y"]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "r"},
                {"role": "user", "content": "s"},
            ]
        },
    ]
    given = settings(prompt="Q: {question} R: {response}")
    task = task_of("generate", rows, metric="judge", judge=given)
    shown = [judge_prompt(task.settings.judge, item, "{question}") for item in task.items]
    assert shown == ["Q: {a} R: {question}", "Q: user: q\nassistant: r\nuser: s R: {question}"]
    assert judge_prompt(JudgeSettings(**settings()), task.items[0], "z") == "{a}|x\ny|z"
