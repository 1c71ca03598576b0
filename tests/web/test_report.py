"""The report page: complete, escaped, the same bytes each time, and good when there is little to tell."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.web.synthetic import EVIL, add_task, full_story, new_workspace, score, train

from meristem.errors import BadInput
from meristem.web.charts import nice_ticks
from meristem.web.pages import SCRIPT
from meristem.web.report import render, write_report
from meristem.workspace import Workspace

VOID = {"meta", "br", "link", "img", "hr", "input"}
SECTIONS = ["lineage", "scores", "decisions", "training", "cost", "evidence", "commands"]


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load or run."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert not any(name.startswith("on") for name in found), "inline event handler"
        self.ids += [found["id"] or ""] if "id" in found else []
        self.loads += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return full_story(tmp_path_factory.mktemp("story") / "ws")


@pytest.fixture(scope="module")
def page(story: Workspace) -> str:
    return render(story, "support")


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def section(html: str, name: str) -> str:
    return html.split(f'<section id="{name}">')[1].split("</section>")[0]


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    found = Page(page)
    assert [name for name in found.ids if name in SECTIONS] == SECTIONS
    assert found.loads == []
    assert found.scripts == [SCRIPT]
    assert "url(" not in page and "@import" not in page


def test_text_of_users_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(") >= 4  # prompts of flipped items and the signal's note
    assert "wrong &lt;b&gt;" in page
    assert len(re.findall(r"<script", page)) == 1


def test_same_workspace_gives_the_same_bytes(story: Workspace, page: str, tmp_path: Path) -> None:
    before = story.verify()
    written = write_report(story, "support", tmp_path / "new" / "r.html")
    assert written.read_text(encoding="utf-8") == page
    again = Workspace.open(story.root, actor="somebody else")
    assert render(again, "support") == page
    assert story.verify() == before  # a report leaves no trace


def test_head_tells_verdict_champion_and_evidence(story: Workspace, page: str) -> None:
    head = text_of(page.split("</header>")[0])
    assert "Passed support@v4 passed all 5 gates against support@v2." in head
    assert "It became the champion (release-2); it was rolled back to support@v2 (release-3)." in head
    assert "Champion support@v2 the version in use: industrial model on base" in head
    assert "✓ Intact" in head
    assert story.verify().head.removeprefix("sha256:")[:12] in head


def test_lineage_shows_models_and_states(page: str) -> None:
    tree = text_of(section(page, "lineage"))
    for words in (
        "base foundation",
        "support@v2 ★ champion",
        "support@v3 ✕ blocked: failed",
        "support@v4 ↩ rolled back",
    ):
        assert words in tree


def test_heat_map_marks_what_was_not_measured(page: str) -> None:
    scores = text_of(section(page, "scores"))
    assert "support@v1 ● earlier champion 16.7 not measured" in scores  # columns as learned
    assert "support@v3 ✕ blocked: failed 33.3 96.7" in scores
    assert "1 cell not measured" in scores
    assert "ACC 91.7 %" in scores  # v2's line learned one task
    assert "BWT Not known : needs two learned tasks" in scores


def test_metrics_come_from_stored_cells_only(tmp_path: Path) -> None:
    ws = full_story(tmp_path / "ws")
    ws.rollback("support", to="support@v4")
    told = text_of(section(render(ws, "support"), "scores"))
    assert "ACC 91.7 %" in told
    assert "BWT +5.0 points" in told
    assert "FWT Not known : needs support@v1 on orders, not measured" in told
    score(ws, ws.version("support@v1"), "orders", 2)
    told = text_of(section(render(ws, "support"), "scores"))
    matrix = ws.task_matrix("support").matrix
    assert f"FWT +{100 * (matrix.fwt or 0):.1f} points" in told
    assert "Not known" not in told


def test_decisions_carry_gates_comparison_and_flips(page: str) -> None:
    decisions = section(page, "decisions")
    assert re.findall(r'<article class="decision" id="([\w-]+)"', decisions) == [
        "decision-3",
        "decision-2",
        "decision-1",
    ]
    blocked = text_of(decisions.split('id="decision-2"')[1].split("</article>")[0])
    assert "support@v3 was blocked: against support@v2 it failed No loss on routing" in blocked
    assert "worse than before: 91.67% -&gt; 33.33% on 60 items" in blocked
    assert "−58.3" in blocked and "margin −5.0" in blocked and "&lt; 0.001" in blocked
    assert "35 items went from right to wrong; the first 12 are shown" in blocked
    assert "9 more" in blocked
    assert "Champion answered answer 20 ✕ Candidate answered wrong" in blocked


def test_curves_and_costs(page: str) -> None:
    training = section(page, "training")
    assert training.count('class="chart"') == 4  # three losses and one penalty
    assert "ewc (strength 50)" in training and "Penalty of ewc" in training
    cost = text_of(section(page, "cost"))
    assert "update-1 → support@v2 1 min 02 s 3 1,234" in cost
    assert "Total 4 min 32 s 9 3,702 420" in cost


def test_trail_folds_older_events_and_commands_are_exact(story: Workspace, page: str) -> None:
    total = len(list(story.events()))
    assert f"{total - 30} earlier event" in section(page, "evidence")
    commands = text_of(section(page, "commands"))
    assert "--workspace ws release rollback support --to support@v1 --reason" in commands
    assert f"--workspace ws log verify --head {story.verify().head}" in commands


def test_the_page_says_nothing_of_this_machine(story: Workspace, page: str, tmp_path: Path) -> None:
    """It is made to be forwarded: no absolute path, and the same bytes wherever the workspace lies."""
    assert str(story.root) not in page and str(story.root.parent) not in page
    shutil.copytree(story.root, tmp_path / "elsewhere" / "ws")
    moved = Workspace.open(tmp_path / "elsewhere" / "ws")
    assert render(moved, "support") == page
    moved.close()


def test_model_without_history_still_makes_a_good_page(tmp_path: Path) -> None:
    ws = new_workspace(tmp_path / "ws")
    for model in ("support", "base"):
        page = render(ws, model)
        told = text_of(page)
        Page(page)
        for words in (
            "No update of this model has been judged yet",
            "no test suite in this workspace",
            "No decision yet",
        ):
            assert words in told
        for words in (
            "has not been trained in this workspace yet",
            "so nothing was spent",
            "nothing to roll back to",
        ):
            assert words in told


def test_update_without_decision_and_without_curve(tmp_path: Path) -> None:
    ws = new_workspace(tmp_path / "ws")
    add_task(ws, "routing", tmp_path / "files")
    train(ws, ws.version("support"), "routing", [], [])
    told = text_of(render(ws, "support"))
    assert "support@v2 ○ not judged yet" in told and "No curve was recorded" in told


def test_damage_is_told(tmp_path: Path) -> None:
    ws = full_story(tmp_path / "ws")
    location = ws.store.location(ws.evaluations()[0].record.results)
    with ws.store.packs.path(location.pack).open("r+b") as file:
        file.seek(location.offset + 5)
        file.write(b"#")
    told = text_of(render(ws, "support"))
    assert "✕ Not intact: 1 problem" in told and "Cannot be shown" in told


def test_unknown_model_is_refused(story: Workspace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown model 'nope'"):
        write_report(story, "nope", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_ticks_are_round_and_reach_the_top() -> None:
    assert nice_ticks(2.2) == [0, 1, 2, 3]
    assert nice_ticks(0.03)[-1] >= 0.03
    assert nice_ticks(0) == [0, 1]
