"""Suites: what is embedded, the digest, and every refusal."""

from __future__ import annotations

import json

import pytest

from meristem.data.overlap import leaks
from meristem.errors import BadInput
from meristem.evaluation.suites import Suite, load_suite

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
    assert suite.tasks[1].max_new_tokens == 5
    assert suite.size == 5


def test_document_round_trip_and_digest(tmp_path):
    suite = load_suite(write(tmp_path / "one"))
    stored = json.loads(json.dumps(suite.to_document()))
    assert Suite.from_document(stored) == suite
    assert Suite.from_document(stored).digest == suite.digest
    moved = load_suite(write(tmp_path / "two", "schema: meristem/suite/v1\n" + TASKS.lstrip()))
    assert moved.digest == suite.digest  # neither paths nor spelling of the YAML count
    changed = load_suite(write(tmp_path / "two", facts=[*FACTS[:1], {"prompt": "1+1?", "answer": "3"}]))
    assert changed.digest != suite.digest


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
    (TASKS.replace("metric: accuracy", "metric: exact_match"), "a choice task has the metric accuracy"),
    (TASKS.replace("kind: target", "kind: odd"), "tasks.0.kind"),
    (TASKS.replace("kind: target", "kind: target\n    extra: 1"), "tasks.0.extra"),
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
        "belongs to tasks of type generate",
    ),
    (TASKS.replace("max_new_tokens: 5", "options: [a, b]"), "options belong to"),
    (TASKS.replace("max_new_tokens: 5", "max_new_tokens: 0"), "max_new_tokens"),
]


@pytest.mark.parametrize(("yaml", "message"), YAML_REFUSALS)
def test_suite_file_refusals(tmp_path, yaml, message):
    path = write(tmp_path, yaml)
    with pytest.raises(BadInput) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


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
    ({"prompt": "a", "answer": 4}, '"answer" must be'),
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
