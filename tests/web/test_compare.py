"""The pages of `eval compare` and `eval export`: the comparison's own numbers, escaped, standing alone."""

from __future__ import annotations

import errno
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from tests import acme
from tests.web.test_report import Page, section, text_of

import meristem as ms
from meristem.errors import BadInput, EnvironmentFailure
from meristem.evaluation.exports.finding import finding
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.items import Item, Message
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.choice import Choice
from meristem.web import wording
from meristem.web.exports import evaluation_export, write_comparison
from meristem.web.items import SHORT, questions
from meristem.web.pages import SCRIPT, write_text
from meristem.web.report import render

EVIL = "<script>alert('pwned')</script>"
SECTIONS = ["difference", "where", "answers", "cost", "identity"]


@pytest.fixture(scope="module")
def ws(trained, tmp_path_factory):
    """v3 forgot task a, v4 kept it; suite ``mixed`` asks about a and b in slices, with hostile questions."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(trained, folder / "ws")
    tasks = ""
    for task in "ab":
        rows = [
            {"id": f"{task}{n}", "prompt": f"{task.upper()} {word}{end} ?", "answer": acme.ANSWERS[task]}
            | {"slice": "long" if n % 2 else "short"}
            for n, (word, end) in enumerate((w, e) for w in acme.WORDS for e in "ae")
        ]
        acme.lines(folder / f"{task}.jsonl", rows)
        tasks += (
            f"  - {{name: {task}, type: choice, data: {task}.jsonl, kind: target, options: ['5', '7']}}\n"
        )
    hostile = [
        {"id": "evil", "prompt": f"A {EVIL}", "answer": "7", "slice": "long"},
        {
            "id": "wide",
            "messages": [
                {"role": "system", "content": "Be <b>brief</b>."},
                {"role": "user", "content": f"A {EVIL}"},
            ],
            "answer": "7",
        },
    ]
    acme.lines(folder / "hostile.jsonl", hostile)
    tasks += "  - {name: hostile, type: choice, data: hostile.jsonl, kind: safety, options: ['5', '7']}\n"
    (folder / "mixed.yaml").write_text(f"name: mixed\ntasks:\n{tasks}")
    ws = ms.Workspace.open(folder / "ws", actor="kim")
    ws.add_suite("mixed", folder / "mixed.yaml")
    yield ws
    ws.close()


def page(
    ws: ms.Workspace, new: str, folder: Path, margin: float | None = None, contamination: bool = False
) -> str:
    found = ws.compare(new, "support@v2", suite="mixed")
    told = finding(found, new, "support@v2", margin)
    report = ws.contamination(new, "mixed") if contamination else None
    path = write_comparison(
        ws, new, "support@v2", "mixed", folder / "sub" / "page.html", "html", found, told, margin, report
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def forgot(ws, tmp_path_factory):
    return page(ws, "support@v3", tmp_path_factory.mktemp("forgot"))


@pytest.fixture(scope="module")
def kept(ws, tmp_path_factory):
    return page(ws, "support@v4", tmp_path_factory.mktemp("kept"), 0.1, True)


def test_pages_are_well_formed_and_load_nothing(ws, forgot, kept):
    for html in (forgot, kept, evaluation_export(ws, "support@v3", "mixed", "html")):
        found = Page(html)
        assert found.loads == [] and found.scripts == [SCRIPT]
        assert "url(" not in html and "@import" not in html and str(ws.root) not in html
    assert [name for name in Page(forgot).ids if name in SECTIONS] == SECTIONS


def test_the_verdict_stands_first(forgot, kept):
    verdict = text_of(forgot.split("</header>")[0].split('<p class="verdict')[1])
    assert verdict.startswith(' fail"> ✕ Regression support@v3 is worse than support@v2')
    assert "task a" in verdict
    assert ">✓ No regression<" in kept.split("</header>")[0]


def test_the_numbers_are_the_comparisons(ws, forgot):
    found, shown = ws.compare("support@v3", "support@v2", suite="mixed"), scale(None)
    head = text_of(forgot.split("</header>")[0])
    assert f"{shown.score(found.old_score)} → {shown.score(found.new_score)}" in head
    assert f"{shown.difference(found.difference)} points" in head
    assert " to ".join(map(shown.difference, found.interval)) in head
    assert f"Right → wrong {len(found.flipped)} " in head and f"Wrong → right {len(found.gained)} " in head
    table = section(forgot, "where")
    groups = [*found.tasks, *found.slices]
    rows = re.findall(r"<tr(?: class=\"flagged\")?><th scope=\"row\">(.*?)</tr>", table, re.S)
    assert len(rows) == len(groups)
    for group, row in zip(groups, rows, strict=True):
        told = text_of(row)
        for value in (group.old_score, group.new_score):
            assert shown.score(value) in told
        assert shown.difference(group.difference) in told
        assert ("✕ worse" in told) == group.regressed and ("? too few" in told) == group.too_few


def test_changed_answers_are_all_there_worst_first(ws, forgot):
    found = ws.compare("support@v3", "support@v2", suite="mixed")
    answers = section(forgot, "answers")
    worse, better = answers.split("Wrong before, right now")
    names = re.findall(r'<div class="flip changed"><code>(.*?)</code>', worse)
    assert sorted(names) == sorted(found.flipped)
    assert sorted(re.findall(r'changed"><code>(.*?)</code>', better)) == sorted(found.gained)
    rows = {f"{r['task']}/{r['id']}": r for r in ws.results(ws.evaluate("support@v3", "mixed"))}
    logprobs = [rows[name]["detail"]["logprobs"] for name in names]
    margins = [found["7"] - found["5"] for found in logprobs]
    assert margins == sorted(margins) and margins[0] < 0
    shown = re.findall(r"→ (−[\d.]+)</dd>", worse)
    assert shown[0] == f"−{-margins[0]:.2f}"


def test_questions_are_escaped_and_long_ones_folded(ws, forgot):
    export = evaluation_export(ws, "support@v3", "mixed", "html")
    for html in (forgot, export):
        assert EVIL not in html and len(re.findall(r"<script", html)) == 1 and "<b>brief" not in html
    assert "&lt;script&gt;alert(" in export and "system: Be &lt;b&gt;brief" in export
    changed = section(forgot, "answers")
    assert "hostile/evil" in changed and "&lt;script&gt;alert(" in changed
    assert '<details class="q"><summary>A &lt;script' in changed  # the system message is folded away


def test_long_questions_open_with_their_start():
    [item] = [Item("1", (Message("user", "word " * 100),), "7")]
    asked = questions(Suite("s", (Task("t", "choice", Choice(), "target", (item,)),)))["t/1"]
    assert len(asked.opening) <= SHORT and asked.opening.endswith("…") and asked.whole == "word " * 100


def test_identity_cost_and_calibration(ws, forgot):
    old, new = ws.evaluate("support@v2", "mixed"), ws.evaluate("support@v3", "mixed")
    identity = section(forgot, "identity")
    for digest in (old.record.content, new.record.content, new.record.suite, new.record.engine, new.digest):
        assert digest in identity
    assert identity.count(new.record.engine) == 2  # its text and its title, in one cell for both
    assert "torch" in identity and "batch_tokens" in identity
    cost = text_of(section(forgot, "cost"))
    assert "Calibration error (ECE)" in cost and "Tokens processed" in cost


def test_a_margin_and_contamination_are_shown_when_asked_for(forgot, kept):
    assert "margin −10" in section(kept, "difference") and "Non-inferiority: " in section(kept, "difference")
    found = text_of(section(kept, "contamination"))
    assert "training rows were read" in found and "base@v1 learned from is not recorded" in found
    assert "contamination" not in Page(forgot).ids


def test_the_same_comparison_gives_the_same_bytes(ws, forgot, tmp_path):
    assert page(ws, "support@v3", tmp_path) == forgot


def test_too_few_items_cannot_tell(ws, tmp_path):
    acme.lines(
        tmp_path / "few.jsonl", [{"id": str(n), "prompt": f"A few {n}", "answer": "7"} for n in range(4)]
    )
    task = "{name: few, type: choice, data: few.jsonl, kind: target, options: ['5', '7']}"
    (tmp_path / "few.yaml").write_text(f"name: few\ntasks:\n  - {task}\n")
    ws.add_suite("few", tmp_path / "few.yaml")
    found = ws.compare("support@v4", "support@v2", suite="few")
    told = finding(found, "support@v4", "support@v2", 0.02)
    arguments = (ws, "support@v4", "support@v2", "few", tmp_path / "few.html", "html", found, told, 0.02)
    head = unescape(text_of(write_comparison(*arguments).read_text().split("</header>")[0]))
    assert "? Cannot tell" in head and f"About {told.verdict.needed:,} items would settle it." in head


def test_units_without_right_and_wrong(ws, tmp_path):
    acme.lines(tmp_path / "texts.jsonl", [{"id": str(n), "text": f"Plain text {n} " * 3} for n in range(8)])
    task = "{name: texts, type: perplexity, data: texts.jsonl, kind: general}"
    (tmp_path / "texts.yaml").write_text(f"name: texts\ntasks:\n  - {task}\n")
    ws.add_suite("texts", tmp_path / "texts.yaml")
    found = ws.compare("support@v4", "support@v2", suite="texts")
    told = finding(found, "support@v4", "support@v2")
    arguments = (ws, "support@v4", "support@v2", "texts", tmp_path / "texts.html", "html", found, told)
    html = write_comparison(*arguments).read_text()
    Page(html)
    shown = text_of(html)
    assert "bits per byte" in shown and "Right → wrong" not in shown and "Right before" not in shown
    assert scale("bits_per_byte").score(found.new_score) in shown
    Page(evaluation_export(ws, "support@v4", "texts", "html"))


def test_a_folder_that_cannot_be_written_is_the_environments_fault(ws, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure):
        page(ws, "support@v3", tmp_path / "file")


def test_a_page_is_written_whole_or_not_at_all_and_never_over_a_folder(tmp_path, monkeypatch):
    write_text("old", tmp_path / "page.html")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(EnvironmentFailure, match="free some space"):
        write_text("new", tmp_path / "page.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(BadInput, match="a folder; name a file in it"):
        write_text("new", tmp_path)


def test_the_release_report_shows_units_too(ws, tmp_path):
    """Bits per byte in its heat map, its gates and its comparisons; nothing flips there."""
    acme.lines(tmp_path / "plain.jsonl", [{"id": str(n), "text": f"Another text {n} " * 3} for n in range(8)])
    task = "{name: plain, type: perplexity, data: plain.jsonl, kind: general}"
    (tmp_path / "plain.yaml").write_text(f"name: plain\ntasks:\n  - {task}\n")
    ws.add_suite("plain", tmp_path / "plain.yaml")
    old, new = ws.evaluate("support@v2", "plain"), ws.evaluate("support@v3", "plain")
    found = ws.compare("support@v3", "support@v2", suite="plain")
    gate = ws.judge("support@v3", "support@v2", suite="plain", gate="non_inferiority", margin=0.05)
    numbers = dict(wording.gate_numbers(gate.numbers, scale(found.unit)))
    assert numbers["candidate"] == scale("bits_per_byte").score(found.new_score)
    assert numbers["margin"] == "0.05 bits per byte"
    html = render(ws, "support")
    Page(html)
    for entry in (old, new):
        assert scale("bits_per_byte").score(entry.record.summary["score"]) in section(html, "scores")
