"""The contract of gates: what a case offers, contamination as a criterion, units, and gates of other packages."""

from __future__ import annotations

import dataclasses

import pytest
from tests import acme

import meristem as ms
from meristem.config import ModelSettings
from meristem.data.matching import ItemMatch
from meristem.errors import BadInput, GateFailed
from meristem.evaluation.comparison import compare
from meristem.evaluation.contamination import Checked, ContaminationReport, Unchecked
from meristem.release import criteria, decisions, gates, rollout
from meristem.release.cases import GateCase, Measured


@pytest.fixture
def ws(grown):
    ws = ms.Workspace.open(grown, actor="kim")
    yield ws
    ws.close()


def leaky(ws, tmp_path, prompt="B ash 5 or?"):
    """A suite one of whose two items shares three words in a row with data b: ``B ash ?`` and its answer 5."""
    items = [
        {"id": "odd", "prompt": prompt, "answer": "5"},
        {"id": "fine", "prompt": "x y z u v", "answer": "7"},
    ]
    acme.lines(tmp_path / "odd.jsonl", items)
    (tmp_path / "odd.yaml").write_text(
        "name: odd\ntasks:\n  - {name: odd, type: choice, data: odd.jsonl, metric: accuracy, kind: general, "
        "options: ['5', '7']}\n"
    )
    return ws.add_suite("odd", tmp_path / "odd.yaml")


def propose(ws, *policy, version="support@v4"):
    settings = ModelSettings.model_validate({"gates": list(policy)})
    entry = decisions.propose(ws.store, "kim", settings, ws.evaluator(), ws.version(version), None)
    return ws.explain(entry.id)


KEPT = {"gate": "non_inferiority", "suites": ["a"], "margin": 0.2}
CLEAN = {"gate": "contamination", "suites": ["odd"], "ngram": 3}


def test_a_contaminated_suite_blocks_a_release(ws, tmp_path):
    leaky(ws, tmp_path)
    measured = len(ws.evaluations())
    decision = propose(ws, KEPT, CLEAN)
    kept, clean = decision.gates
    assert (kept.outcome, clean.outcome, decision.record.outcome) == ("pass", "fail", "fail")
    assert clean.reason.startswith(
        "1 of 2 items stand in the training data (limit 0), 1 of them with their answer: odd/odd; "
        "32 rows of 2 data sets read for 3 words in a row"
    )
    assert clean.numbers == {
        "ngram": 3, "n": 2, "contaminated": 1, "exact": 0, "with_answer": 1, "searched": 2, "rows": 32,
        "unchecked_data": 0, "first": ["odd/odd"],
    }  # fmt: skip
    assert len(ws.evaluations()) == measured  # the suite of a gate that compares nothing is not run
    assert len(decision.record.evaluations) == 2
    with pytest.raises(GateFailed):
        ws.promote(decision)
    allowed = propose(ws, KEPT, {**CLEAN, "max_share": 0.5})
    ws.promote(allowed)
    assert ws.version("support").number == 4 and ws.verify().intact


def test_deleted_data_leave_the_question_open(ws, tmp_path):
    leaky(ws, tmp_path)
    ws.delete_data("b", "a person asked for it")
    open_, accepted = propose(ws, KEPT, CLEAN), propose(ws, KEPT, {**CLEAN, "unchecked": "accept"})
    assert [open_.record.outcome, accepted.record.outcome] == ["inconclusive", "pass"]
    told = open_.gates[1].reason
    assert "not checked, because its rows are gone: b@v1 (deleted by event" in told
    assert "a person asked" not in told  # the words stay in their event


def test_a_clean_suite_alone_is_no_evidence(ws):
    with pytest.raises(BadInput, match="no gate of model support compares it with the champion on any suite"):
        propose(ws, {"gate": "contamination"})


def test_a_clean_suite_in_words(ws):
    result = propose(ws, KEPT, {"gate": "contamination", "max_items": 0}).gates
    assert {gate.outcome for gate in result} == {"pass"} and {gate.suite for gate in result} == {"a", "b"}
    assert "what base@v1 learned from is not recorded" in result[-1].reason


# What a gate makes of a report


def report(shares, items=40, answers=0, unchecked=(), blank=0):
    found = tuple(ItemMatch(f"t/{i}", "ngram", s, i < answers, 1, ()) for i, s in enumerate(shares))
    return ContaminationReport(
        "m@v2", "sha256:2", "s@v1", "sha256:1", 13, items, items, blank, found,
        (Checked("d@v1", "sha256:3", 100),), tuple(unchecked), (),
    )  # fmt: skip


class Brought:
    """Evidence that a test brings."""

    def __init__(self, found=None, comparison=None):
        self.found, self.made = found, comparison

    def comparison(self, case, slice_):
        return self.made

    def contamination(self, case, ngram):
        return self.found


def judged(ws, evidence, name="contamination", **arguments):
    version = ws.version("support")
    return gates.judge(name, arguments, GateCase(version, version, ws.asset("suite", "a"), evidence))


@pytest.mark.parametrize(
    ("arguments", "shares", "outcome"),
    [
        ({}, [], "pass"),
        ({}, [0.01], "fail"),
        ({"max_items": 1}, [0.01], "pass"),
        ({"max_items": 1}, [0.01, 1.0], "fail"),
        ({"max_share": 0.05}, [1.0, 1.0], "pass"),
        ({"max_share": 0.05}, [1.0, 1.0, 1.0], "fail"),
        ({"min_share": 0.5}, [0.5, 0.1], "pass"),
        ({"min_share": 0.5}, [0.6, 0.1], "fail"),
    ],
)
def test_limits(ws, arguments, shares, outcome):
    assert judged(ws, Brought(report(shares)), **arguments).outcome == outcome


def test_a_limit_passed_is_a_fail_whatever_else_is_missing(ws):
    gone = [Unchecked("e@v1", "sha256:4", "deleted by event 9")]
    assert judged(ws, Brought(report([1.0], unchecked=gone))).outcome == "fail"
    assert judged(ws, Brought(report([], unchecked=gone))).outcome == "inconclusive"
    assert judged(ws, Brought(report([], blank=3))).outcome == "inconclusive"
    assert judged(ws, Brought(report([], blank=3)), unchecked="accept").outcome == "pass"


def test_few_ids_are_named_and_all_are_counted(ws):
    result = judged(ws, Brought(report([1.0] * 9, answers=2)))
    assert result.reason.startswith(
        "9 of 40 items stand in the training data (limit 0), 2 of them with their answer: "
        "t/0, t/1, t/2, t/3, t/4 and 4 more; "
    )
    assert result.numbers["first"] == [f"t/{i}" for i in range(5)] and result.numbers["contaminated"] == 9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_items": 1, "max_share": 0.1}, "give max_items or max_share, not both"),
        ({"max_items": -1}, "max_items"),
        ({"ngram": 2}, "ngram"),
        ({"unchecked": "ignore"}, "unchecked"),
        ({"confidence": 0.9}, "confidence: extra inputs"),
    ],
)
def test_arguments_that_mean_nothing(arguments, told):
    with pytest.raises(BadInput, match=f"gate contamination: .*{told}"):
        gates.build("contamination", arguments)


# Slices


def sliced(ws, tmp_path):
    """Suite a again, its first ten items in the slice ``old`` and the others in ``new``."""
    items = [{**item, "slice": "old" if at < 10 else "new"} for at, item in enumerate(acme.test_items("a"))]
    acme.lines(tmp_path / "sliced.jsonl", items)
    (tmp_path / "sliced.yaml").write_text(
        "name: sliced\ntasks:\n  - {name: a, type: choice, data: sliced.jsonl, kind: target, options: ['5', '7', '9']}\n"
    )
    return ws.add_suite("sliced", tmp_path / "sliced.yaml")


def test_a_gate_may_ask_about_one_slice_alone(ws, tmp_path):
    sliced(ws, tmp_path)
    gate = {"gate": "non_inferiority", "suites": ["sliced"], "margin": 0.5, "slice": "old"}
    whole, part = propose(ws, {**gate, "slice": None}, gate).gates
    assert (part.numbers["n"], part.numbers["slice"]) == (10, "old") and whole.numbers["n"] > 10
    with pytest.raises(BadInput, match="slice 'odd' of suite sliced, whose slices are new, old"):
        propose(ws, {**gate, "slice": "odd"})
    results = [ws.results(ws.evaluate(v, "sliced")) for v in ("support@v2", "support@v4")]
    alone = compare(old=[r for r in results[0] if r["slice"] == "old"],
                    new=[r for r in results[1] if r["slice"] == "old"])  # fmt: skip
    assert part.numbers["difference"] == alone.difference


# Units


def bits(shift):
    """Results of a perplexity task; the second half of the items is better by ``shift``."""
    return [
        {
            "task": "p", "id": str(i), "slice": None, "score": -1.0 - i / 400 + shift * (i >= 200),
            "prediction": "", "answer": "", "detail": {}, "unit": "bits_per_byte",
        }
        for i in range(400)
    ]  # fmt: skip


def test_flips_are_not_asked_of_scores_that_are_no_shares(ws):
    evidence = Brought(comparison=compare(old=bits(0), new=bits(0.01)))
    with pytest.raises(
        BadInput, match="gate negative_flips cannot judge suite a: its scores are bits per byte"
    ):
        judged(ws, evidence, "negative_flips", max_rate=0.1)
    assert judged(ws, evidence, "non_inferiority", margin=0.1).outcome == "pass"


def test_such_a_suite_is_refused_before_training(ws):
    entry = ws.asset("suite", "a")
    facts = {**entry.record.facts, "unit": "bits_per_byte"}
    scored = dataclasses.replace(entry, record=entry.record.model_copy(update={"facts": facts}))

    def spelled(gate, suites="learned", **arguments):
        policy = ModelSettings.model_validate({"gates": [{"gate": gate, "suites": suites, **arguments}]})
        return criteria.spelled_out(policy, [scored], set(), {"a"})

    with pytest.raises(BadInput, match="cannot judge suite a: its scores are bits per byte"):
        spelled("negative_flips", ["a"], max_rate=0.1)
    assert spelled("negative_flips", max_rate=0.1) == []  # unnamed, it is passed over
    assert len(spelled("non_inferiority", margin=2)) == 1
    scored = entry
    with pytest.raises(BadInput, match="non_inferiority: margin: 2 is more than the scores of suite a can"):
        spelled("non_inferiority", margin=2)


# Gates of others


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    info = folder / "acme_gates-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-gates\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[meristem.gates]\nsmall_suite = acme_gates:SmallSuite\n")
    (folder / "acme_gates.py").write_text(
        "from meristem.evaluation.verdicts import Verdict\n"
        "from meristem.release.gates import Gate, GateCase\n\n\n"
        "class SmallSuite(Gate):\n"
        "    most: int\n\n"
        "    def judge(self, case: GateCase) -> Verdict:\n"
        "        n = case.comparison.n\n"
        "        told = f'{case.candidate.label} against {case.champion.label} on {case.suite.label}: {n} items'\n"
        "        return Verdict('pass' if n <= self.most else 'fail', told, {'n': n})\n"
    )
    monkeypatch.syspath_prepend(str(folder))


def test_a_gate_of_another_package(ws, third_party):
    decision = propose(ws, {"gate": "small_suite", "suites": ["a"], "most": 40})
    (result,) = decision.gates
    assert (result.outcome, result.reason) == ("pass", "support@v4 against support@v2 on a@v1: 40 items")
    assert rollout.promote(ws.store, "kim", decision.entry).kind == "release"


def test_evidence_is_gathered_once_and_only_when_asked(ws, tmp_path):
    odd, a = leaky(ws, tmp_path), ws.asset("suite", "a")
    evidence, version = Measured(ws.evaluator(), [odd]), ws.version("support@v4")
    case = GateCase(version, ws.version("support"), a, evidence)
    first = case.contamination(3)
    assert evidence.used == [] and case.contamination(3) is first and first.suite == "a@v1"
    other = dataclasses.replace(case, suite=odd)
    assert [match.item for match in other.contamination(3).found] == ["odd/odd"]
    assert not other.contamination().found  # other numbers, another search
    assert case.comparison is case.comparison and len(evidence.used) == 2
