"""The report's numbers by hand, its pictures, and what stands beside them."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from tests.bench import tiny_stream

from meristem.bench import published, report, summary, tables
from meristem.errors import BadInput

result = tiny_stream.result

# A[1,1], A[1,2]; A[2,1], A[2,2]. By hand, with b = 0.2 and s = (0.8, 0.6):
# seed 0: ACC (0.4 + 0.6)/2 = 0.5, BWT 0.4 - 0.8 = -0.4, FWT 0.3 - 0.2 = 0.1, after 0.6 - 0.6 = 0, forgetting 0.4/2 = 0.2
# seed 1: ACC (0.6 + 0.8)/2 = 0.7, BWT 0.6 - 0.8 = -0.2, FWT 0.1 - 0.2 = -0.1, after 0.8 - 0.6 = 0.2, forgetting 0.1
SEQUENTIAL = ([[0.8, 0.3], [0.4, 0.6]], [[0.8, 0.1], [0.6, 0.8]])
REPLAY = ([[0.8, 0.2], [0.8, 0.6]], [[0.8, 0.2], [0.8, 0.6]])
ALONE = [[0.8, None], [None, 0.6]]
JOINT = [[None, None], [0.7, 0.9]]
MATRICES = {"sequential": SEQUENTIAL, "experience-replay:ratio=0.3": REPLAY}


@pytest.fixture
def folder(tmp_path):
    documents = []
    for seed in (0, 1):
        documents += [result(name, scores[seed], seed=seed) for name, scores in MATRICES.items()]
        documents.append(result("per-task", ALONE, seed=seed, order="any", single=[0.8, 0.6]))
        documents.append(result("joint", JOINT, seed=seed, order="any"))
    return tiny_stream.write(tmp_path, *documents)


def test_the_table_by_hand(folder):
    [group] = summary.groups(report.results.read_all(folder))
    rows = {row[0]: row[1:] for row in tables.results_table(group).rows}
    assert list(rows) == ["untrained", "sequential", "experience-replay:ratio=0.3", "joint", "per-task"]
    assert rows["untrained"][2] == "0.200"
    sd = "0.141"  # of two values 0.2 apart: 0.2 / sqrt(2)
    assert rows["sequential"] == [
        "2",
        "16",
        f"0.600 ± {sd}",
        f"-0.300 ± {sd}",
        f"0.000 ± {sd}",
        f"0.100 ± {sd}",
        "0.150 ± 0.071",
        "0.750 ± 0.071",  # (0.8 + 0.6)/2 and (0.8 + 0.8)/2
        "3 ± 0",
    ]
    assert rows["experience-replay:ratio=0.3"][2:5] == ["0.700 ± 0.000", "0.000 ± 0.000", "0.000 ± 0.000"]
    assert rows["joint"][2:4] == ["0.800 ± 0.000", "-"]
    assert rows["per-task"][2:] == ["0.700 ± 0.000", "-", "-", "-", "-", "0.700 ± 0.000", "3 ± 0"]
    last = {row[0]: row[1:] for row in tables.tasks_table(group).rows}
    assert last["sequential"] == ["0.500 ± 0.141", "0.700 ± 0.141"]
    assert last["joint"] == ["0.700 ± 0.000", "0.900 ± 0.000"]


def test_orders_are_put_together_task_by_task(tmp_path):
    """The same scores learned the other way round: the columns follow the tasks, not the places."""
    one = result("sequential", [[0.8, 0.3], [0.4, 0.6]])
    two = result("sequential", [[0.9, 0.2], [0.5, 0.7]], order="2", tasks=("blue", "red"))
    alone = result("per-task", ALONE, order="any", single=[0.8, 0.6])
    [group] = summary.groups([one, two, alone])
    assert group.orders == {"1": ["red", "blue"], "2": ["blue", "red"]}
    assert dict(zip(group.tasks, tables.tasks_table(group).rows[0][1:], strict=True)) == {
        "red": "0.550 ± 0.212",  # 0.4 and 0.7
        "blue": "0.550 ± 0.071",  # 0.6 and 0.5
    }
    after = [line.metric("fwt_trained") for line in group.methods[0].lines]
    assert after == pytest.approx([0.6 - 0.6, 0.7 - 0.8])  # in order 2 red is the second task


def test_both_files_and_every_picture(folder):
    markdown, page = report.write_report(folder)
    stems = {"curves-order1", "matrix-order1", "plane"}
    found = sorted(path.name for path in (folder / "report/plots").iterdir())
    assert found == sorted(f"1-tiny-2-{stem}.{form}" for stem in stems for form in ("png", "svg"))
    for path in (folder / "report/plots").iterdir():
        assert path.stat().st_size > 2000
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text, html = markdown.read_text(), page.read_text()
    assert "| sequential | 2 | 16 | 0.600 ± 0.141 | -0.300 ± 0.141 |" in text
    assert text.count("](plots/1-tiny-2-") == 3 and html.count("data:image/svg+xml;base64,") == 3
    assert '<td class="num">0.600 ± 0.141</td>' in html and "http" not in html.replace("http-equiv", "")
    assert "different seeds" not in html and "library versions" not in html


def test_published_numbers_stand_beside_the_same_stream_and_are_marked(tmp_path):
    tasks = ("dbpedia", "amazon", "yahoo", "agnews")
    scores = [[0.5] * 4] * 4
    found = result("sequential", scores, protocol="standard-4", tasks=tasks)
    [group] = summary.groups([found])
    table = tables.results_table(group)
    beside = [row for at, row in enumerate(table.rows) if at in table.published]
    assert ["published: O-LoRA, T5-large", "-", "-", "0.758"] in [row[:4] for row in beside]
    assert all(row[0].startswith("published: ") for row in beside) and len(beside) == 9
    assert len(table.rows) == 2 + 9
    [tiny] = summary.groups([result("sequential", SEQUENTIAL[0])])
    assert not tables.results_table(tiny).published


def test_the_signs_of_published_bwt():
    """TreeLoRA's table prints forgetting as a positive number; here negative is forgetting."""
    for number in published.NUMBERS:
        assert 0 < number.acc < 1 and number.model and number.stream in published.STREAMS
        if number.bwt is not None:
            assert number.bwt < 0, number
    tree = next(n for n in published.of_stream("trace") if n.method == "TreeLoRA")
    assert (tree.printed, tree.bwt) == ("3.8", -0.038)
    rows = tables.published_table(["trace"]).rows
    assert ["38.9"] not in rows and all(row[3] for row in rows)


def test_runs_under_other_conditions_have_a_table_of_their_own(folder):
    document = result("sequential", SEQUENTIAL[0], seed=7)
    document["settings"]["recipe"]["max_steps"] = 99
    other = result("sequential", SEQUENTIAL[0], seed=7, recipe=document["settings"]["recipe"])
    tiny_stream.write(folder, other)
    found = summary.groups(report.results.read_all(folder))
    assert [len(group.methods) for group in found] == [4, 1]
    assert "Without a per-task run" in " ".join(report._warnings(found[1]))


def test_one_task_and_bounds_alone_have_fewer_pictures(tmp_path):
    """A plane needs forgetting, and curves an order."""
    one = result("sequential", [[0.8]], tasks=("red",), protocol="tiny-text")
    bound = result("joint", JOINT, order="any")
    report.write_report(tiny_stream.write(tmp_path, one, bound))
    found = {path.stem for path in (tmp_path / "report/plots").iterdir()}
    assert found == {"2-tiny-text-curves-order1", "2-tiny-text-matrix-order1"}


def test_uneven_seeds_and_library_versions_are_told(folder):
    tiny_stream.write(folder, result("sequential", SEQUENTIAL[0], seed=2, code={"python": "4"}))
    [group] = summary.groups(report.results.read_all(folder))
    told = " ".join(report._warnings(group))
    assert "different seeds (sequential: 0, 1, 2; experience-replay:ratio=0.3: 0, 1; " in told
    assert "different library versions" in told


def test_nothing_to_report(tmp_path, folder):
    with pytest.raises(BadInput, match="no results here; `meristem bench run` makes them"):
        report.write_report(tmp_path / "empty")
    path = next((folder / "results").iterdir())
    path.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(BadInput, match="not a meristem/bench-result/v1 file"):
        report.write_report(folder)


def test_a_real_run_can_be_reported(done, tmp_path):
    shutil.copytree(done[0] / "results", tmp_path / "results")
    markdown, _ = report.write_report(tmp_path, tmp_path / "page")
    acc = done[2][0][1]["acc"]
    assert f"| sequential | 1 | 8 | {acc:.3f} |" in markdown.read_text()
    assert (tmp_path / "page/plots/1-tiny-2-plane.png").exists()
