"""`meristem eval`: exit codes that a pipeline can stand on, files in the format of their ending, numbers for people."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest
import yaml
from tests import acme

COMPARE = ("eval", "compare", "support@v4", "support@v2", "--suite", "a")
FORGOT = ("eval", "compare", "support@v3", "support@v2", "--suite", "a")
EXPORT = ("eval", "export", "support@v3", "--suite", "a")


def test_run_tells_score_cost_and_where_it_comes_from(cli, grown):
    done = cli(grown, "eval", "run", "support@v3", "--suite", "a")
    assert "over 40 items" in done.out and " ms per item; stored before)" in done.out


def test_run_tells_bits_per_byte_and_what_was_cut(cli, grown, tmp_path):
    acme.lines(tmp_path / "texts.jsonl", [{"text": f"Plain text number {n}."} for n in range(4)])
    (tmp_path / "p.yaml").write_text(
        "name: p\ntasks:\n  - {name: texts, type: perplexity, data: texts.jsonl, kind: general}\n"
    )
    acme.lines(tmp_path / "long.jsonl", [{"prompt": "A " + "long " * 80, "answer": "7"}])
    (tmp_path / "l.yaml").write_text(
        "name: l\ntasks:\n  - {name: long, type: choice, data: long.jsonl, kind: target, options: ['5', '7'], truncation: left}\n"
    )
    for name in "pl":
        assert cli(grown, "suite", "add", name, "--file", tmp_path / f"{name}.yaml").code == 0
    out = cli(grown, "eval", "run", "support@v2", "--suite", "p").out
    assert (
        out.count("bits per byte") == 3 and "texts, all bytes as one text: " in out
    )  # the whole, the task, the task as one
    out = cli(grown, "eval", "run", "support@v2", "--suite", "l").out
    assert "  1 prompt did not fit the model's window and was cut" in out


def test_compare_without_a_margin(cli, grown):
    done = cli(grown, *FORGOT)
    assert done.code == 1 and "support@v3 is worse than support@v2: the score fell" in done.out
    assert cli(grown, *COMPARE).code == 0
    found = json.loads(cli(grown, *FORGOT, "--json").out)
    assert found["outcome"] == "regression" and "verdict" not in found


@pytest.mark.parametrize(
    ("words", "code", "outcome"),
    [
        ((*COMPARE, "--margin", "0.9"), 0, "pass"),
        ((*COMPARE, "--margin", "0"), 3, "inconclusive"),
        ((*FORGOT, "--margin", "0.1"), 1, "fail"),
    ],
)
def test_compare_with_a_margin(cli, grown, words, code, outcome):
    done = cli(grown, *words, "--json")
    assert (done.code, json.loads(done.out)["verdict"]["outcome"]) == (code, outcome)


def test_a_margin_that_makes_no_sense_is_bad_input(cli, grown):
    for margin in ("1.5", "-0.1"):
        done = cli(grown, *COMPARE, "--margin", margin)
        assert done.code == 2 and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("ending", ["html", "md", "xml", "json"])
def test_compare_writes_the_format_of_the_ending(cli, grown, tmp_path, ending):
    path = tmp_path / "new" / f"found.{ending}"
    done = cli(grown, *FORGOT, "--to", path)
    assert done.code == 1 and done.out.splitlines()[-1] == str(path)
    text = path.read_text(encoding="utf-8")
    if ending == "json":
        found = json.loads(text)
        assert (
            found["outcome"] == "regression"
            and len(found["new"]["items"]) == len(found["old"]["items"]) == 40
        )
    elif ending == "xml":
        assert len(list(ET.fromstring(text).iter("testcase"))) == 40
    else:
        assert text.startswith({"html": "<!doctype html>", "md": "# support@v3 against support@v2"}[ending])


def test_an_unknown_ending_is_refused_before_anything_is_measured(cli, grown, tmp_path):
    done = cli(
        grown, "eval", "compare", "support@v9", "support@v2", "--suite", "a", "--to", tmp_path / "f.pdf"
    )
    assert done.code == 2 and "use one of .json, .xml" in done.err


def test_contamination_on_the_page_when_asked_for(cli, grown, tmp_path):
    path = tmp_path / "page.html"
    assert cli(grown, *FORGOT, "--to", path, "--contamination").code == 1
    assert 'id="contamination"' in path.read_text()


def test_export_to_stdout_and_to_a_file(cli, grown, tmp_path):
    assert len(json.loads(cli(grown, *EXPORT).out)["items"]) == 40
    assert ET.fromstring(cli(grown, *EXPORT, "--format", "junit").out).tag == "testsuites"
    found = json.loads(cli(grown, *EXPORT, "--format", "markdown", "--json").out)
    assert found["format"] == "markdown" and found["text"].startswith("# support@v3 on a@v1")
    path = tmp_path / "r.yaml"
    done = cli(grown, *EXPORT, "--to", path, "--dataset", "acme/routing", "--json")
    assert json.loads(done.out) == {"format": "hf", "file": str(path)}
    assert yaml.safe_load(path.read_text())[0]["dataset"] == {"id": "acme/routing", "task_id": "a"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--format", "pdf"), "formats: json"),
        (("--format", "junit", "--dataset", "acme/routing"), "--dataset belongs"),
        (("--format", "hf", "--dataset", "routing"), "ORG/NAME"),
    ],
)
def test_export_refuses(cli, grown, more, message):
    done = cli(grown, *EXPORT, *more)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_contamination_found_is_exit_1(cli, grown, tmp_path):
    """An item that v2 learned, but for case and the question mark: near enough to know it, too far to be refused."""
    acme.lines(tmp_path / "leak.jsonl", [{"id": "leak", "prompt": "a ASH", "answer": "7"}])
    (tmp_path / "leak.yaml").write_text(
        "name: leak\ntasks:\n  - {name: leak, type: choice, data: leak.jsonl, kind: target, options: ['5', '7']}\n"
    )
    assert cli(grown, "eval", "contamination", "support@v2", "--suite", "a").code == 0
    assert cli(grown, "suite", "add", "leak", "--file", tmp_path / "leak.yaml").code == 0
    done = cli(grown, "eval", "contamination", "support@v2", "--suite", "leak")
    assert done.code == 1 and "1 of 1 items stand in training data (16 rows read" in done.out
    assert "leak/leak: whole, in " in done.out
    found = json.loads(cli(grown, "eval", "contamination", "support@v2", "--suite", "leak", "--json").out)
    assert found["contaminated"] == 1
    assert (
        cli(grown, "eval", "contamination", "support@v1", "--suite", "leak").code == 0
    )  # it learned nothing


def test_matrix_shows_what_it_knows(cli, grown):
    done = cli(grown, "eval", "matrix", "support@v4")
    assert done.code == 0 and "ACC +" in done.out and "GAD" not in done.out
    assert "FWT as some print it" in done.out
