"""Suites: what is embedded, the digest, and every refusal."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml

from meristem.data.overlap import leaks
from meristem.errors import BadInput
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite

TASKS = """
name: core
tasks:
  - name: topics
    type: choice
    data: items/topics.jsonl
    metric: accuracy
    kind: target
    prompt: "Topic of: {text}"
    system: One word.
    options: [billing, delivery]
  - name: facts
    type: generate
    data: facts.jsonl
    metric: exact_match
    kind: general
    max_new_tokens: 5
"""
TOPICS = [
    {"id": "a", "text": "bill", "answer": "billing", "slice": "short"},
    {"text": "van", "answer": 1},
    {"text": "x", "answer": "z", "options": ["z", "y"]},
]
FACTS = [
    {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"},
    {"prompt": "1+1?", "answer": "2"},
]


def write(folder, yaml=TASKS, topics=TOPICS, facts=FACTS):
    (folder / "items").mkdir(parents=True, exist_ok=True)
    for name, rows in (("items/topics.jsonl", topics), ("facts.jsonl", facts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "s.yaml").write_text(yaml)
    return folder / "s.yaml"


def test_items_are_embedded_and_prompts_resolved(tmp_path):
    suite = load_suite(write(tmp_path))
    first, second, third = suite.tasks[0].items
    assert first.chat() == [
        {"role": "system", "content": "One word."},
        {"role": "user", "content": "Topic of: bill"},
    ]
    assert (first.id, first.slice, first.options, first.source) == (
        "a",
        "short",
        ("billing", "delivery"),
        "bill",
    )
    assert (second.id, second.answer) == ("topics-2", "delivery")
    assert third.options == ("z", "y")
    assert suite.tasks[1].settings.max_new_tokens == 5
    assert suite.size == 5


def test_document_round_trip_and_digest(tmp_path):
    suite = load_suite(write(tmp_path / "one"))
    stored = json.loads(json.dumps(suite.to_document()))
    assert Suite.from_document(stored).tasks[1:] == suite.tasks[1:]
    assert Suite.from_document(stored).to_document() == stored
    assert Suite.from_document(stored).digest == suite.digest
    moved = load_suite(write(tmp_path / "two", "schema: meristem/suite/v1\n" + TASKS.lstrip()))
    assert moved.digest == suite.digest  # neither paths nor spelling of the YAML count
    changed = load_suite(write(tmp_path / "two", facts=[*FACTS[:1], {"prompt": "1+1?", "answer": "3"}]))
    assert changed.digest != suite.digest


def test_a_suite_of_the_first_version_keeps_its_digest(tmp_path):
    """As that version of Meristem computed it, so that stored evaluations still belong to it."""
    digest = "sha256:b843839a70a9707d1f77cf8813eb353740a3fc7c33af0ff8aedbb73b56910dd8"
    suite = load_suite(write(tmp_path))
    assert suite.digest == digest
    document = suite.to_document()
    assert {task["max_new_tokens"] for task in document["tasks"]} == {None, 5}
    assert Suite.from_document(document).digest == digest


def test_documents_that_are_refused(tmp_path):
    good = load_suite(write(tmp_path)).to_document()
    with pytest.raises(BadInput, match="'meristem/suite/v9' is unknown"):
        Suite.from_document({**good, "schema": "meristem/suite/v9"})
    with pytest.raises(BadInput, match="damaged"):
        Suite.from_document({**good, "tasks": [{}]})
    with pytest.raises(BadInput, match="keys or values"):
        Suite.from_document({**good, "extra": 1})
    bad = json.loads(json.dumps(good))
    bad["tasks"][0]["items"][0]["answer"] = "nowhere"
    with pytest.raises(BadInput, match="not among the options"):
        Suite.from_document(bad)
    bad = json.loads(json.dumps(good))
    bad["tasks"][0]["kind"] = "other"
    with pytest.raises(BadInput, match="kind 'other'"):
        Suite.from_document(bad)
    for key in ("format", "truncation"):
        bad = json.loads(json.dumps(good))
        bad["tasks"][0][key] = "other"
        with pytest.raises(BadInput, match=f"{key} 'other'"):
            Suite.from_document(bad)


def test_leaks_see_the_filled_template_and_the_raw_field(tmp_path):
    rows = load_suite(write(tmp_path)).test_rows()
    train = [
        {"id": "1", "prompt": "topic of: BILL", "completion": "x"},
        {"id": "2", "prompt": "van", "completion": "x"},
    ]
    assert leaks(train, rows) == [("1", "topics/a"), ("2", "topics/topics-2")]


YAML_REFUSALS = [
    ("", "empty or not a mapping"),
    ("name: [", "not YAML"),
    ("name: x\ntasks: []", "tasks"),
    (TASKS.replace("type: choice", "type: guess"), "tasks.0.type"),
    (TASKS.replace("metric: accuracy", "metric: f1"), "tasks.0.metric"),
    (TASKS.replace("metric: accuracy", "metric: exact_match"), "tasks.0.metric: Input should be 'accuracy'"),
    (TASKS.replace("kind: target", "kind: odd"), "tasks.0.kind"),
    (TASKS.replace("kind: target", "kind: target\n    extra: 1"), "tasks.0.extra"),
    (
        TASKS.replace("options: [billing", "option: [billing"),
        "tasks.0.option: unknown key; did you mean 'options'?",
    ),
    (
        TASKS.replace("kind: target", "kind: target\n    promt: x"),
        "tasks.0.promt: unknown key; did you mean 'prompt'?",
    ),
    (TASKS.replace("tasks:", "task:"), "task: unknown key; did you mean 'tasks'?"),
    (TASKS.replace("kind: target", "knd: target"), "tasks.0.kind: missing"),
    (TASKS + "extra: 1", "extra"),
    ("schema: meristem/suite/v2" + TASKS, "schema"),
    (TASKS.replace("name: facts", "name: topics"), "two tasks are named 'topics'"),
    (TASKS.replace("items/topics", "nowhere"), "no data file 'nowhere.jsonl'"),
    (TASKS.replace("{text}", "{text.x}"), "plain {field} names"),
    (TASKS.replace("{text}", "{0}"), "plain {field} names"),
    (TASKS.replace("{text}", "{text!r:>9}"), "plain {field} names"),
    (TASKS.replace("{text}", "{"), "prompt template"),
    (TASKS.replace("{text}", "all"), "uses no {field}"),
    (TASKS.replace("[billing, delivery]", "[billing]"), "at least two"),
    (TASKS.replace("[billing, delivery]", "[a, b, a]"), "repeats 'a'"),
    (
        TASKS.replace("[billing, delivery]", "[a, b]\n    max_new_tokens: 3"),
        "tasks.0.max_new_tokens",
    ),
    (TASKS.replace("max_new_tokens: 5", "options: [a, b]"), "tasks.1.options"),
    (
        TASKS.replace("max_new_tokens: 5", f"temperature: 1.0\n    seed: {2**64}"),
        "a number in it cannot be stored",
    ),
    (TASKS.replace("max_new_tokens: 5", "max_new_tokens: 0"), "max_new_tokens"),
]


@pytest.mark.parametrize(("yaml", "message"), YAML_REFUSALS)
def test_suite_file_refusals(tmp_path, yaml, message):
    path = write(tmp_path, yaml)
    with pytest.raises(BadInput) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_template_that_asks_for_another_field_is_told_before_the_unknown_one(tmp_path):
    path = write(tmp_path, TASKS.replace("{text}", "{txt}"))
    with pytest.raises(
        BadInput, match=r"topics\.jsonl:1: the prompt template asks for 'txt', which this item lacks"
    ):
        load_suite(path)


def test_missing_unreadable_and_enormous_suite_files(tmp_path):
    with pytest.raises(BadInput, match="no such suite"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_bytes(b"name: \xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_suite(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(BadInput, match="larger than 1 MiB"):
        load_suite(tmp_path / "s.yaml")


ITEM_REFUSALS = [
    ({"answer": "billing"}, "field 'text' of the prompt template is missing"),
    ({"text": " ", "answer": "billing"}, "field 'text'"),
    ({"text": "x", "answer": "other"}, "'other' is not among the options"),
    ({"text": "x", "answer": 2}, "2 is no index of 2 options"),
    ({"text": "x"}, '"answer" must be'),
    ({"text": "x", "answer": True}, '"answer" must be'),
    ({"text": "x", "answer": "a", "options": ["a"]}, "at least two"),
    ({"text": "x", "answer": "a", "options": ["a", "a"]}, "repeats 'a'"),
    ({"text": "x", "answer": "a", "options": ["a", 1]}, "list of non-empty strings"),
    ({"text": "x", "answer": "billing", "note": "n"}, "unknown keys ['note']"),
    ({"text": "x", "answer": "billing", "id": "a"}, "already used on line 1"),
    ({"text": "x", "answer": "billing", "slice": 3}, '"slice" must be'),
    ({"text": "x", "answer": "billing", "id": 1.5}, '"id" must be'),
]


@pytest.mark.parametrize(("item", "message"), ITEM_REFUSALS)
def test_choice_item_refusals_name_file_and_line(tmp_path, item, message):
    with pytest.raises(BadInput) as caught:
        load_suite(write(tmp_path, topics=[TOPICS[0], item]))
    assert str(caught.value).startswith(f"{tmp_path / 'items/topics.jsonl'}:2: ")
    assert message in str(caught.value)


OTHER_REFUSALS = [
    ({"answer": "4"}, 'either "prompt"'),
    ({"prompt": "a", "messages": [], "answer": "4"}, 'either "prompt"'),
    ({"prompt": "a", "answer": "4", "options": ["4", "5"]}, "options"),
    ({"prompt": "a", "answer": 4.5}, "4.5 can be written in several ways"),
    ({"prompt": "a", "answer": "4", "cluster": 7}, '"cluster" must be'),
    ({"messages": [{"role": "assistant", "content": "4"}], "answer": "4"}, "must end before"),
    ({"messages": "hi", "answer": "4"}, "non-empty list of messages"),
]


@pytest.mark.parametrize(("item", "message"), OTHER_REFUSALS)
def test_generate_item_refusals(tmp_path, item, message):
    with pytest.raises(BadInput, match=r"facts\.jsonl:1: ") as caught:
        load_suite(write(tmp_path, facts=[item]))
    assert message in str(caught.value)


def test_empty_items_missing_options_and_two_system_messages(tmp_path):
    with pytest.raises(BadInput, match="empty"):
        load_suite(write(tmp_path, topics=[]))
    with pytest.raises(BadInput, match='needs "options"'):
        load_suite(write(tmp_path, TASKS.replace("options: [billing, delivery]", "")))
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    yaml = TASKS.replace('prompt: "Topic of: {text}"', "")
    with pytest.raises(BadInput, match="both give a system message"):
        load_suite(write(tmp_path, yaml, topics=[{"messages": chat, "answer": "billing"}]))


SHOTS = [{"text": text, "answer": "billing"} for text in ("invoice", "fee", "refund", "charge")]
SHOWN = TASKS.replace("kind: target", "kind: target\n    few_shot: {data: shots.jsonl, count: 2, seed: 1}")


def write_shots(folder, shots=SHOTS, text=SHOWN):
    path = write(folder, text)
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots))
    return path


def test_worked_examples_stand_between_system_message_and_question(tmp_path):
    suite = load_suite(write_shots(tmp_path))
    task = suite.tasks[0]
    shown = task.chat(task.items[0])
    assert [message["role"] for message in shown] == ["system", *["user", "assistant"] * 2, "user"]
    assert {m["content"] for m in shown[1:5:2]} < {f"Topic of: {row['text']}" for row in SHOTS}
    assert [m["content"] for m in shown[2:5:2]] == ["billing", "billing"]
    assert shown[0]["content"] == "One word."
    assert shown[-1]["content"] == "Topic of: bill"
    assert task.chat(task.items[1])[:-1] == shown[:-1]
    assert load_suite(write_shots(tmp_path)).digest == suite.digest
    other = load_suite(write_shots(tmp_path, text=SHOWN.replace("seed: 1", "seed: 2")))
    assert other.digest != suite.digest
    assert Suite.from_document(suite.to_document()).tasks[0].shots == task.shots


@pytest.mark.parametrize(
    ("shots", "text", "message"),
    [
        (
            [*SHOTS, {"text": " VAN ", "answer": "delivery"}],
            SHOWN,
            "example 'shots-5' is the test item 'topics-2'",
        ),
        (SHOTS[:1], SHOWN, "shots.jsonl has 1 examples, not 2"),
        (SHOTS, SHOWN.replace("count: 2", "count: 0"), "tasks.0.few_shot.count"),
        (SHOTS, SHOWN.replace("shots.jsonl", "none.jsonl"), "no data file 'none.jsonl'"),
        ([{"text": "x", "answer": "other"}], SHOWN, "shots.jsonl:1: "),
        (
            [{"messages": [{"role": r, "content": r} for r in ("system", "user")], "answer": "x"}],
            f"{TASKS}    few_shot: {{data: shots.jsonl, count: 1}}\n",
            "example 'shots-1' has a system message",
        ),
    ],
)
def test_worked_examples_that_are_refused(tmp_path, shots, text, message):
    with pytest.raises(BadInput) as caught:
        load_suite(write_shots(tmp_path, shots, text))
    assert message in str(caught.value)


def test_a_data_file_that_changed_under_its_name_is_refused(tmp_path):
    path = write(tmp_path)
    data = tmp_path / "facts.jsonl"
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    path.write_text(TASKS.replace("data: facts.jsonl", f"data: facts.jsonl\n    sha256: {digest}"))
    pinned = load_suite(path)
    assert pinned.digest == load_suite(write(tmp_path / "plain")).digest  # the items say it already
    path.write_text(TASKS.replace("data: facts.jsonl", f"data: facts.jsonl\n    sha256: {digest}"))
    data.write_text(data.read_text().replace("1+1?", "1+2?"))
    with pytest.raises(BadInput) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{data}: its content changed: sha256 is ")
    assert f"the suite asks for {digest}" in str(caught.value)


def suite_file(folder, rows, **task):
    """A suite of one task, ``task`` over the defaults; its items are ``rows``."""
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"name": "s", "tasks": [{"name": "t", "kind": "general", "data": "items.jsonl", **task}]}
    (folder / "s.yaml").write_text(yaml.safe_dump(content))
    return folder / "s.yaml"


QUESTION = {"prompt": "p", "answer": "a"}
JUDGE = {
    "url": "https://judge.example/v1/",
    "model": "m",
    "prompt": "Good? {response}",
    "scale": [1, 5],
    "api_key_env": "KEY",
    "seed": None,
    "options": {"reasoning_effort": "low"},
}
EVERY_TYPE = [
    ([{**QUESTION, "options": ["a", "b"]}], {"type": "choice"}),
    ([QUESTION], {"type": "choice", "options": ["a", "b"], "scoring": "unconditional", "format": "text"}),
    ([QUESTION], {"type": "generate", "truncation": "left"}),
    ([{**QUESTION, "answer": ["a", "b"], "cluster": "c"}], {"type": "generate", "metric": "token_f1"}),
    ([{**QUESTION, "answer": 3.5}], {"type": "generate", "metric": "numeric", "tolerance": 1}),
    ([{**QUESTION, "answer": {"k": [1]}}], {"type": "generate", "metric": "json", "ignore_case": True}),
    (
        [QUESTION],
        {"type": "generate", "samples": 3, "temperature": 1, "top_p": 0.5, "seed": 7, "stop": ["."]},
    ),
    (
        [{**QUESTION, "answer": "word"}],  # of an "a" nothing would be left
        {"type": "generate", "extract": "(.*)", "normalize": True, "max_new_tokens": 9},
    ),
    ([{"prompt": "p"}], {"type": "generate", "metric": "judge", "judge": JUDGE}),
    ([{"text": "abc", "cluster": "c", "slice": "s"}], {"type": "perplexity"}),
    ([{"text": "abc"}], {"type": "perplexity", "window": 64}),
    ([{"prompt": "p", "chosen": "c", "rejected": "r"}], {"type": "preference"}),
    (
        [{"prompt": "p", "chosen": "c", "rejected": "r"}],
        {"type": "preference", "metric": "margin", "scoring": "length", "system": "s"},
    ),
]


@pytest.mark.parametrize(("rows", "task"), EVERY_TYPE)
def test_every_type_is_stored_and_read_again(tmp_path, rows, task):
    suite = load_suite(suite_file(tmp_path, rows, **task))
    again = Suite.from_document(json.loads(json.dumps(suite.to_document())))
    assert again.to_document() == suite.to_document()
    assert again.tasks[0].items == suite.tasks[0].items
    assert again.digest == suite.digest
    assert again.unit == suite.unit
    leaner = {key: value for key, value in task.items() if key in ("type", "metric", "judge", "options")}
    plain = load_suite(suite_file(tmp_path, rows, **leaner))
    assert (plain.digest == suite.digest) == (leaner == task)  # whatever changes a result changes the digest


def test_the_scores_of_a_suite_have_one_unit(tmp_path):
    path = write(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n')
    text = {"name": "prose", "type": "perplexity", "kind": "general", "data": "texts.jsonl"}
    content = yaml.safe_load(TASKS)
    path.write_text(yaml.safe_dump({**content, "tasks": [*content["tasks"], text]}))
    with pytest.raises(
        BadInput, match=r"s\.yaml: .*'prose' in bits per byte.* and 'topics' in shares; make a suite"
    ):
        load_suite(path)


def test_texts_take_no_prompt_and_no_examples(tmp_path):
    for more in ({"prompt": "{text}"}, {"system": "s"}, {"few_shot": {"data": "items.jsonl", "count": 1}}):
        with pytest.raises(BadInput, match="task 't': "):
            load_suite(suite_file(tmp_path, [{"text": "abc"}], type="perplexity", **more))


def test_leaks_see_texts(tmp_path):
    rows = load_suite(suite_file(tmp_path, [{"text": "A long passage"}], type="perplexity")).test_rows()
    assert leaks([{"id": "1", "text": "a LONG passage"}], rows) == [("1", "t/items-1")]


def test_a_wrong_setting_inside_a_judge_is_placed(tmp_path):
    task = {"type": "generate", "metric": "judge", "judge": {**JUDGE, "url": "http://u:p@host/v1"}}
    with pytest.raises(BadInput, match=r"s\.yaml: tasks\.0\.judge\.url: an address holds no key"):
        load_suite(suite_file(tmp_path, [QUESTION], **task))
