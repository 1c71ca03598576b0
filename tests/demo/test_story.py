"""The demo's story, told in full with a tiny model and the tests' own tasks in place of the real ones."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from tests import acme

import meristem as ms
from meristem.config import load_config
from meristem.demo import story, tampering
from meristem.ecosystem import versions
from meristem.errors import BadInput, MeristemError

LETTERS = dict(zip(story.TASKS, "abc", strict=True))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """``(text, workspace folder)`` of a demo in which only model, data and recipe are small."""
    data = tmp_path_factory.mktemp("data")
    for task, letter in LETTERS.items():
        acme.lines(data / f"{task}.train.jsonl", acme.training_rows(letter))
        acme.lines(data / f"{task}.test.jsonl", acme.test_items(letter))
        about = f"name: {task}, type: choice, data: {task}.test.jsonl, metric: accuracy, kind: target"
        suite = f"name: {task}\ntasks:\n  - {{{about}, options: ['1', '3', '5', '7', '9']}}\n"
        (data / f"{task}.suite.yaml").write_text(suite)
    folder, out = tmp_path_factory.mktemp("demo") / "ws", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "DATA", data)
        patch.setattr(story, "SOURCE", str(acme.model_folder(data / "model")))
        patch.setattr(story, "SETTINGS", acme.CONFIG.replace("{", "{{").replace("}", "}}"))
        report = story.run(folder, seed=0, console=Console(file=out, width=300))
    assert report == folder / "report.html" and report.stat().st_size > 10_000
    return out.getvalue(), folder


@pytest.fixture
def ws(told):
    opened = ms.Workspace.open(told[1], actor="demo")
    yield opened
    opened.close()


def test_every_chapter_is_told(told):
    text, _ = told
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == list("123456")
    assert "The gate blocks it: " in text and " tickets were routed right and are now wrong:" in text
    assert re.search(r"support@v3 does not ship", text) and re.search(r"support@v4 is released", text)
    assert "the released line: ACC +" in text
    assert "rolled back from support@v4 to support@v2" in text
    assert "log verify: intact (" in text
    assert text.count("log verify finds ") == 3
    assert "report: " in text and "your turn: meristem --workspace " in text


def test_the_stricter_policy_is_inconclusive_with_a_number_of_items(told):
    asked = [line for line in told[0].splitlines() if line.startswith("  margin ")]
    assert "inconclusive" in asked[-1]
    assert re.search(r"about \d+ items would settle it \(there are 40\)", asked[-1])


def test_the_story_is_in_the_workspace(told, ws):
    assert ws.version("support").number == 2
    assert [entry.record.kind for entry in ws.history("support")] == ["promote", "promote", "rollback"]
    assert [entry.status for entry in ws.records("decision")] == ["pass", "fail", "pass"]
    assert ws.verify().intact
    assert not list(told[1].glob("tampered-*"))


def test_a_weight_of_the_champion_is_what_is_flipped(ws):
    what, problems = next(tampering.tamper_with_copies(ws))
    with ws.store.database.read() as connection:
        champion = versions.content_of(connection, ws.version("support").content)
    assert what == "one bit of a weight flipped"
    (problem,) = problems
    assert any(digest in problem for digest in champion.tensors.values())


def test_tampering_that_goes_unnoticed_breaks_the_story(ws, monkeypatch):
    monkeypatch.setattr(tampering, "_flip_weight", lambda _: None)
    with pytest.raises(MeristemError, match="did not notice a copy with one bit"):
        next(tampering.tamper_with_copies(ws))


WALKS = {
    "the first that asks too much": (["pass", "pass", 900], 3),
    "not one that no number of items answers": (["pass", None, "fail", "pass", 900], 5),
}


class Judge:
    """A workspace that answers each stricter question in turn."""

    def __init__(self, answers):
        self.answers = iter(answers)
        self.asked = []

    def judge(self, new, old, **question):
        self.asked.append((question["margin"], question["confidence"]))
        answer = next(self.answers, "pass")
        told = answer if isinstance(answer, str) else "inconclusive"
        return SimpleNamespace(outcome=told, reason="why", needed=None if isinstance(answer, str) else answer)


@pytest.mark.parametrize(("answers", "asked"), WALKS.values(), ids=WALKS)
def test_ever_stricter_margins_are_asked_until_more_items_are_needed(answers, asked):
    judge = Judge(answers)
    story._strict_margin(story.Teller(Console(file=io.StringIO())), judge)
    assert judge.asked == list(story.STRICTER[:asked])


@pytest.mark.parametrize("answer", ["pass", "fail", None])
def test_a_story_without_an_inconclusive_answer_broke(answer):
    judge = Judge([answer] * len(story.STRICTER))
    with pytest.raises(MeristemError, match="story broke"):
        story._strict_margin(story.Teller(Console(file=io.StringIO())), judge)


def test_only_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="not empty and not an earlier demo"):
        story._workspace(tmp_path / "mine", 0, None)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    for _ in range(2):
        made = story._workspace(tmp_path / "demo", 3, None)
        assert made.settings(story.MODEL).recipe["seed"] == 3
        made.close()
        (tmp_path / "demo/left-over").touch()
    assert load_config(tmp_path / "demo/meristem.yaml").for_model(story.MODEL).attempts == 2


def test_text_of_the_data_is_no_markup():
    out = io.StringIO()
    story.Teller(Console(file=out)).chapter("an [order] of [bold]tea")
    assert "an [order] of [bold]tea" in out.getvalue()
