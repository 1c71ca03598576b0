"""Bad input is refused with one line on stderr and exit code 2, and the workspace is as it was: a test per row."""

from __future__ import annotations

import json

import pytest
from tests import acme

import meristem as ms

ROW = json.dumps({"prompt": "question {n}", "completion": "yes"})
GOOD = [ROW.replace("{n}", str(n)) for n in range(20)]


def refused(cli, folder, *words, told):
    """Run a command that must be refused: one line that says ``told``, exit code 2, nothing changed."""
    was = acme.state(folder)
    done = cli(folder, *words)
    assert done.code == 2, done
    assert done.out == ""
    line = done.err.rstrip("\n")
    assert line.startswith("meristem: ") and "\n" not in line
    assert told in line
    assert acme.state(folder) == was


def with_line(number, text):
    return "\n".join([*GOOD[: number - 1], text, *GOOD[number:]]) + "\n"


FILES = {
    "empty file": ("", "bad.jsonl: the file is empty"),
    "line 17 not JSON": (with_line(17, "{oops"), "bad.jsonl:17: not JSON"),
    "wrong keys": (
        with_line(3, '{"question": "q", "answer": "a"}'),
        "bad.jsonl:3: keys ['answer', 'question']",
    ),
    "empty completion": (
        with_line(5, '{"prompt": "q", "completion": " "}'),
        'bad.jsonl:5: "completion" is empty',
    ),
    "not UTF-8": (with_line(2, ROW).encode() + b'{"prompt": "caf\xe9"}\n', "bad.jsonl:21: not UTF-8"),
    "duplicate ids": (
        with_line(9, '{"id": "bad-4", "prompt": "q", "completion": "a"}'),
        "bad.jsonl:9: id 'bad-4' is already used on line 4",
    ),
    "a test item in the training data": (
        with_line(4, '{"prompt": "  a ASHS ?", "completion": "7"}'),
        "1 training rows are also test items of suite a@v1 (bad-4 = a/a-ashs)",
    ),
    "NaN": (with_line(6, '{"prompt": "q", "completion": "a", "label": NaN}'), "bad.jsonl:6: NaN"),
}


@pytest.mark.parametrize(("body", "told"), FILES.values(), ids=FILES)
def test_a_bad_data_file(cli, fresh, tmp_path, body, told):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    refused(cli, fresh, "data", "add", "bad", "--file", path, told=told)


def test_a_missing_file(cli, fresh, tmp_path):
    refused(cli, fresh, "data", "add", "bad", "--file", tmp_path / "no.jsonl", told="no.jsonl: no such file")
    refused(cli, fresh, "suite", "add", "bad", "--file", tmp_path / "no.yaml", told="no.yaml: no such suite")
    refused(
        cli,
        fresh,
        "update",
        "run",
        "support",
        "--data",
        "a",
        "--recipe",
        tmp_path / "no.yaml",
        told="no.yaml",
    )


def test_a_test_item_that_stands_in_data_already(cli, fresh, tmp_path):
    """The suite comes after the data."""
    acme.lines(tmp_path / "items.jsonl", [{"prompt": "A ash ?", "answer": "7"}])
    path = tmp_path / "leak.yaml"
    path.write_text(_suite(options="['7', '5']"))
    refused(
        cli, fresh, "suite", "add", "leak", "--file", path, told="data a@v1: 1 training rows are also test"
    )


def test_a_test_item_in_the_data_of_a_plan(cli, fresh, tmp_path, monkeypatch):
    """Data and suite that came in at the same moment, each unseen by the other: caught when they are planned."""
    from meristem.evaluation import contamination

    acme.lines(tmp_path / "leak.jsonl", [{"prompt": "A ashs ?", "completion": "7", "task": "a"}])
    ws = ms.Workspace.open(fresh)
    with monkeypatch.context() as patched:
        patched.setattr(contamination, "leaks", lambda *_: [])
        ws.add_data("leak", tmp_path / "leak.jsonl")
    ws.signal("new-data", "support", data=["leak"])
    ws.close()
    told = "data leak@v1: 1 training rows are also test items of suite a@v1 (leak-1 = a/a-ashs)"
    refused(cli, fresh, "plan", "make", "support", told=told)
    refused(cli, fresh, "loop", "run", told=told)
    refused(cli, fresh, "update", "run", "support", "--data", "leak", told=told)
    # The way out: take the signal back.
    assert cli(fresh, "signal", "close", "signal-1", "--reason", "leaks").code == 0
    assert cli(fresh, "loop", "run").code == 0
    refused(cli, fresh, "signal", "close", "signal-1", told="signal-1 is closed")


def _suite(**changed):
    task = {"name": "leak", "type": "choice", "data": "items.jsonl", "metric": "accuracy", "kind": "target"}
    task |= changed
    return "name: x\ntasks:\n  - {" + ", ".join(f"{k}: {v}" for k, v in task.items()) + "}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_suite(options="['only']"), "options"),
        (_suite(options="['7', '7']"), "options"),
        (_suite(metric="bleu"), "tasks.0.metric"),
        (_suite(data="nowhere.jsonl"), "no data file 'nowhere.jsonl'"),
        ("name: [x\n", "not YAML"),
        ("- 1\n", "not a mapping"),
    ],
)
def test_a_bad_suite_file(cli, fresh, tmp_path, text, told):
    """A choice task with one option among them."""
    acme.lines(tmp_path / "items.jsonl", [{"prompt": "fresh question", "answer": "only"}])
    (tmp_path / "bad.yaml").write_text(text)
    refused(cli, fresh, "suite", "add", "bad", "--file", tmp_path / "bad.yaml", told=told)


def test_data_of_a_shape_that_the_stage_cannot_learn(cli, fresh, tmp_path):
    """Refused when it is planned, not after an update was opened for it."""
    rows = [{"prompt": f"q {n}", "chosen": "a", "rejected": "b", "task": "a"} for n in range(4)]
    acme.lines(tmp_path / "pairs.jsonl", rows)
    assert cli(fresh, "data", "add", "pairs", "--file", tmp_path / "pairs.jsonl").code == 0
    told = "data pairs@v1 has preference rows; stage cit learns messages and prompt-completion rows"
    refused(cli, fresh, "update", "run", "support", "--data", "pairs", told=told)


UNKNOWN = {
    "model": (
        ("update", "run", "nobody", "--data", "a"),
        "unknown model 'nobody'; models here: base, support",
    ),
    "model to roll back": (("release", "rollback", "nobody"), "unknown model 'nobody'"),
    "model to plan": (("plan", "make", "nobody"), "unknown model 'nobody'"),
    "version": (("eval", "run", "support@v9", "--suite", "a"), "'support@v9': no such version"),
    "alias": (("model", "show", "support@canary"), "has no alias 'canary'; it has: challenger, champion"),
    "digest": (("model", "show", "support@sha256:00"), "at least 12 digits"),
    "suite": (("eval", "run", "support", "--suite", "z"), "unknown suite 'z'; here: a, b"),
    "data": (("update", "run", "support", "--data", "a,z"), "unknown dataset 'z'; here: a, b"),
    "no data": (("update", "run", "support", "--data", " , "), "at least one data set"),
    "method": (("update", "run", "support", "--data", "a", "--method", "ewd"), "there is no method 'ewd'"),
    "method argument": (
        ("update", "run", "support", "--data", "a", "--method", "ewc:strenth=5"),
        "has no argument 'strenth': did you mean 'strength'?",
    ),
    "method value": (("update", "run", "support", "--data", "a", "--method", "ewc:strength=-1"), "strength"),
    "stage": (("update", "run", "support", "--data", "a", "--stage", "rl"), "stage"),
    "signal kind": (("signal", "add", "--kind", "rain", "--model", "support"), "unknown signal kind 'rain'"),
    "new data without data": (("signal", "add", "--kind", "new-data", "--model", "support"), "needs --data"),
    "record": (("release", "explain", "decision-99"), "there is no decision-99"),
    "kind of record": (("release", "promote", "update-1"), "update-1 is no decision"),
    "kind of record to plan": (("plan", "show", "update-1"), "update-1 is no plan"),
    "no id at all": (("update", "resume", "x"), "'x' is not a record id"),
    "tier": (("model", "add", "m", "--tier", "gold", "--base", "base"), "tier 'gold'"),
    "source": (("model", "add", "m", "--tier", "foundation", "--source", "/no"), "'/no': no such folder"),
    "base": (("model", "add", "m", "--tier", "industrial", "--base", "no"), "unknown model 'no'"),
    "a second model of a name": (
        ("model", "add", "base", "--tier", "industrial", "--base", "base"),
        "model 'base' exists already",
    ),
    "name": (("data", "add", "No Such", "--file", "x.jsonl"), "use lower-case letters"),
    "flag": (("model", "list", "--colour"), "No such option: --colour (see --help)"),
    "command": (("fly",), "No such command 'fly' (see --help)"),
    "missing option": (("eval", "run", "support"), "Missing option '--suite'"),
    "missing argument": (("release", "promote"), "Missing argument 'ID'"),
    "the champion itself": (("release", "propose", "support"), "support@v2 is the champion already"),
    "rollback to what never was champion": (
        ("release", "rollback", "support", "--to", "support@v3"),
        "support@v3 was never the champion",
    ),
}


@pytest.mark.parametrize(("words", "told"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(cli, grown, words, told):
    refused(cli, grown, *words, told=told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("schema: [\n", "meristem.yaml:2: not valid YAML"),
        ("just text\n", "expected keys and values"),
        ("schema: meristem/workspace/v1\ncolour: red\n", "colour: unknown key"),
        ("schema: meristem/workspace/v9\n", "schema"),
        ("schema: meristem/workspace/v1\ndefaults: {attempts: 0}\n", "defaults.attempts"),
        ("schema: meristem/workspace/v1\nmodels: {support: {recipe: {speed: 1}}}\n", "speed"),
        ("schema: meristem/workspace/v1\ndefaults: {\x07}\n", "meristem.yaml"),
    ],
)
def test_a_bad_configuration(cli, fresh, text, told):
    (fresh / "meristem.yaml").write_text(text)
    refused(cli, fresh, "model", "list", told=told)


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("{gate: magic, suites: all}", "unknown gate 'magic'"),
        ("{gate: non_inferiority, suites: all}", "gate non_inferiority: margin"),
        ("{gate: non_inferiority, suites: all, margin: 2}", "gate non_inferiority: margin"),
        ("{gate: non_inferiority, suites: all, margin: 0.1, sides: 2}", "gate non_inferiority: sides"),
        ("{gate: improvement, suites: [nope]}", "names the unknown suite 'nope'"),
    ],
)
def test_a_bad_policy_is_refused_before_training(cli, fresh, gate, told):
    acme.gates(fresh, gate)
    refused(cli, fresh, "update", "run", "support", "--data", "a", told=told)


def test_no_gate_that_applies(cli, fresh, files):
    """Without a suite for its task an update could never be released: said before it is trained."""
    assert cli(fresh, "data", "add", "c", "--file", files / "c.jsonl").code == 0
    refused(cli, fresh, "update", "run", "support", "--data", "c", told="add a suite with a task named c")


def test_a_missing_workspace(cli, tmp_path, monkeypatch):
    done = cli(tmp_path / "nowhere", "model", "list")
    assert done.code == 2 and "nowhere: no meristem.yaml here; make a workspace" in done.err
    monkeypatch.delenv("MERISTEM_WORKSPACE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli(None, "model", "list").code == 2
    assert list(tmp_path.iterdir()) == []


def test_init_twice(cli, fresh):
    refused(cli, fresh, "init", fresh, told="there is a workspace already")
