"""Exports of one evaluation and of a comparison: complete, readable by the tools they are for, never misread."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml

import meristem as ms
from meristem.errors import BadInput, EnvironmentFailure
from meristem.evaluation.exports import hub, junit
from meristem.evaluation.exports.document import Measured, measured
from meristem.evaluation.exports.finding import finding
from meristem.evaluation.exports.formats import COMPARISON, EVALUATION, evaluation_text, format_of
from meristem.evaluation.exports.markdown import comparison_markdown, evaluation_markdown
from meristem.evaluation.exports.scales import scale

# What jenkinsci/xunit-plugin's junit-10.xsd allows of what is used: parents, attributes (required ones in capitals).
ALLOWED = {
    "testsuites": ({"testsuite"}, {"name", "time", "tests", "failures", "errors"}),
    "testsuite": (
        {"properties", "testcase"},
        {"NAME", "TESTS", "FAILURES", "ERRORS", "skipped", "time", "timestamp"},
    ),
    "properties": ({"property"}, set()),
    "property": (set(), {"NAME", "VALUE"}),
    "testcase": ({"failure", "system-out"}, {"NAME", "classname"}),
    "failure": (set(), {"message", "type"}),
    "system-out": (set(), set()),
}


def check_junit(text: str) -> ET.Element:
    """Every element and attribute is one that the schema knows, the required ones are there, the counts add up."""
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        children, attributes = ALLOWED[element.tag]
        assert {child.tag for child in element} <= children
        assert element.attrib.keys() <= {name.lower() for name in attributes}
        assert {name.lower() for name in attributes if name.isupper()} <= element.attrib.keys()
    suites = root.findall("testsuite")
    for suite in suites:
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    for count in ("tests", "failures"):
        assert int(root.attrib[count]) == sum(int(suite.attrib[count]) for suite in suites)
    return root


@pytest.fixture(scope="module")
def ws(trained, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("exports") / "ws"
    shutil.copytree(trained, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    yield ws
    ws.close()


def measure(ws: ms.Workspace, reference: str, suite: str = "a") -> Measured:
    version, asset = ws.version(reference), ws.asset("suite", suite)
    return measured(ws.store, version, asset, ws.evaluate(version, suite))


def altered(found: Measured, **changes: object) -> Measured:
    """The same evaluation with other values in its first result."""
    first, *rest = found.results
    return Measured(**{**vars(found), "results": [{**first, **changes}, *rest]})


def test_the_document_holds_every_item_and_what_was_measured(ws):
    found = measure(ws, "support@v3")
    document = found.to_document()
    json.dumps(document)
    assert document["items"] == ws.results(found.entry) and len(document["items"]) == 40
    assert document["model"]["content"] == found.entry.record.content
    assert document["suite"]["digest"] == found.suite.digest
    assert document["engine"]["settings"]["libraries"]["torch"]
    assert document["recorded"]["tool"].startswith("meristem ") and document["recorded"]["actor"] == "kim"
    assert document["cost"]["seconds"] == found.entry.seconds
    assert document["calibration"]["n"] == 40


def test_junit_has_a_case_per_item_and_a_failure_per_wrong_one(ws):
    found = measure(ws, "support@v3")
    root = check_junit(junit.evaluation_junit(found))
    wrong = {row["id"] for row in found.results if row["score"] == 0}
    assert (
        wrong and {c.attrib["name"] for c in root.iter("testcase") if c.find("failure") is not None} == wrong
    )
    assert len(list(root.iter("testcase"))) == 40
    properties = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert properties["content"] == found.version.content and properties["suite digest"] == found.suite.digest


def test_junit_of_a_comparison_fails_what_got_worse_and_nothing_else(ws):
    old, new = measure(ws, "support@v2"), measure(ws, "support@v3")
    compared = ws.compare("support@v3", "support@v2", suite="a")
    root = check_junit(junit.comparison_junit(old, new, compared))
    failed = {f"a/{c.attrib['name']}" for c in root.iter("testcase") if c.find("failure") is not None}
    assert failed == set(compared.flipped)


def test_junit_survives_what_models_say(ws):
    """Control characters that XML cannot hold, markup, and the end of a CDATA section."""
    said = 'a\x00b\x1b[31m <failure/> ]]> & "q" \ud800'
    found = altered(measure(ws, "support@v3"), prediction=said, score=0.0)
    root = check_junit(junit.evaluation_junit(found))
    assert '<failure/> ]]> & "q"' in next(root.iter("failure")).text


def test_graded_scores_are_told_and_units_never_fail(ws):
    found = measure(ws, "support@v2")
    graded = check_junit(junit.evaluation_junit(altered(found, score=0.25)))
    assert "score: 0.25" in next(graded.iter("failure")).text
    nats = check_junit(junit.evaluation_junit(altered(found, score=-3.5, unit="nats")))
    case = next(nats.iter("testcase"))
    assert case.find("failure") is None and "score: -3.5" in case.find("system-out").text


def test_hugging_face_reads_the_file_back(ws):
    from huggingface_hub import parse_eval_result_entries

    found = measure(ws, "support@v3")
    [entry] = parse_eval_result_entries(yaml.safe_load(hub.eval_results_yaml(found, "acme/routing")))
    assert (entry.dataset_id, entry.task_id) == ("acme/routing", "a")
    assert entry.value == found.entry.record.summary["score"] and entry.date == found.event.time
    assert found.version.content in entry.notes and found.suite.digest in entry.notes


def test_without_a_hub_data_set_no_other_one_is_credited(ws):
    """The id that stands in for it cannot be a repository's, not even of a suite that is called like one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    [entry] = yaml.safe_load(hub.eval_results_yaml(measure(ws, "support@v2")))
    with pytest.raises(HFValidationError):
        validate_repo_id(entry["dataset"]["id"])
    with pytest.raises(BadInput, match="ORG/NAME"):
        hub.eval_results_yaml(measure(ws, "support@v2"), "routing")


def test_a_model_card_is_read_back(ws):
    from huggingface_hub import ModelCard

    found = measure(ws, "support@v2")
    [result] = ModelCard(hub.model_card(found)).data.eval_results
    assert result.metric_type == "accuracy" and result.metric_value == found.entry.record.summary["score"]
    assert result.dataset_revision == found.suite.digest


def test_without_huggingface_hub_the_remedy_is_named(ws, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install meristem\[train\]"):
        hub.model_card(measure(ws, "support@v2"))


def test_markdown_rows_keep_their_columns(ws):
    """A bar, a line break or HTML in an answer is text."""
    found = altered(measure(ws, "support@v3"), prediction="a | b\n<script>*x*</script>")
    text = evaluation_markdown(found)
    rows = [line for line in text.split("## Items")[1].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 40
    assert all(line.replace(r"\|", "").count("|") == 7 for line in rows)
    assert "<script>" not in text and r"a \| b \<script\>\*x\*" in text


def test_markdown_shows_every_number_as_people_read_it(ws):
    found = altered(measure(ws, "support@v3"), score=-1.25)
    summary = {**found.entry.record.summary, "score": -1.25, "unit": "bits_per_byte"}
    record = found.entry.record.model_copy(update={"summary": summary})
    text = evaluation_markdown(replace(found, entry=replace(found.entry, record=record)))
    assert "| 1.25 |" in text and "-1.25" not in text


def test_markdown_of_a_comparison(ws):
    old, new = measure(ws, "support@v2"), measure(ws, "support@v3")
    compared = ws.compare("support@v3", "support@v2", suite="a")
    text = comparison_markdown(old, new, compared, finding(compared, "support@v3", "support@v2"))
    assert "**support@v3 is worse than support@v2: the score fell" in text
    assert f"## Right before, wrong now ({len(compared.flipped)})" in text
    assert new.version.content in text and old.version.content in text


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        (None, None, "json"),
        (None, "r.xml", "junit"),
        (None, "r.MD", "markdown"),
        (None, "r.html", "html"),
        (None, "r.yaml", "hf"),
        ("model-card", "README.md", "model-card"),
    ],
)
def test_the_format_follows_the_files_ending(name, to, expected):
    assert format_of(name, to and Path(to), EVALUATION) == expected


@pytest.mark.parametrize(
    ("name", "to", "allowed", "message"),
    [
        ("pdf", None, EVALUATION, "formats: json, junit"),
        (None, "r.pdf", EVALUATION, r"use one of \.json, \.xml"),
        (None, "r.yaml", COMPARISON, "names no format"),
        ("hf", None, COMPARISON, "is unknown"),
    ],
)
def test_unknown_formats_are_refused(name, to, allowed, message):
    with pytest.raises(BadInput, match=message):
        format_of(name, to and Path(to), allowed)


def test_a_data_set_belongs_to_hugging_faces_formats(ws):
    with pytest.raises(BadInput, match="--dataset belongs"):
        evaluation_text(measure(ws, "support@v2"), "junit", "acme/routing")


def test_scores_are_written_the_way_people_read_them():
    assert scale(None).score(0.695) == "69.5 %" and scale(None).difference(-0.021) == "−2.1"
    bits = scale("bits_per_byte")  # kept negative, so that higher is better; read positive, lower is better
    assert bits.score(-0.91) == "0.9100" and bits.difference(-0.02) == "+0.0200"
