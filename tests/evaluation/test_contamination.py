"""Contamination over a version's ancestry: parents' and bases' data count, deleted data are said."""

from __future__ import annotations

import json

import pytest
from tests import acme

import meristem as ms
from meristem.data.ngrams import words
from meristem.ecosystem import lineage, versions
from meristem.ecosystem.records import Version
from meristem.errors import BadInput
from meristem.evaluation.contamination import ancestry_overlap, ancestry_overlaps

LONG = "the kettle that I bought from you in March stopped heating water after two weeks of use"
OTHER = "my neighbour took in a parcel for me yesterday and the box was open at one of its sides"
FRESH = "please tell me whether this lamp can be dimmed with the switch that is already in the wall"
THIRD = "a scratch runs over the whole screen and the shop where I got it has closed down since then"
TEMPLATE = "Read the message of a customer below and name the one team that should answer it today: {text}"


@pytest.fixture
def ws(fresh):
    ws = ms.Workspace.open(fresh, actor="kim")
    yield ws
    ws.close()


def data(ws, name, *rows):
    path = acme.lines(
        ws.root.parent / f"{name}.jsonl", [{"id": f"{name}-{i}", **r} for i, r in enumerate(rows)]
    )
    return ws.add_data(name, path)


def suite(ws, name, *items, template=TEMPLATE):
    path = ws.root.parent / f"{name}.yaml"
    acme.lines(
        ws.root.parent / f"{name}-items.jsonl",
        [{"id": f"i{n}", "answer": a, "text": t} for n, (t, a) in enumerate(items)],
    )
    path.write_text(
        f"name: {name}\ntasks:\n  - {{name: teams, type: choice, data: {name}-items.jsonl, metric: accuracy, "
        f"kind: general, prompt: '{template}', options: [returns, shipping]}}\n"
    )
    return ws.add_suite(name, path)


def grow(ws, parent, *learned, model="support", base=None):
    """A version that learned data sets; its weights are those of its parent with another name on them."""
    parent = ws.version(parent)
    with ws.store.transaction("kim") as tx:
        content = versions.content_of(tx.connection, parent.content)
        record = Version(
            model=model, content=parent.content, base=base or parent.record.base, parents=[parent.digest],
            data=[entry.digest for entry in learned],
        )  # fmt: skip
        return versions.create(tx, content, record)


def row(text, completion="returns"):
    return {"prompt": text, "completion": completion}


def test_planted_overlaps_of_parent_and_base_are_reported_with_their_rows(ws):
    """Twelve shared words, the template and an unrelated row are not."""
    old = data(ws, "old", row(f"Which team? {LONG.upper()}!", "returns"), row("nothing of the kind " * 4))
    below = data(ws, "below", {"text": f"As somebody wrote: {OTHER.replace(' ', ', ')}"})
    new = data(
        ws,
        "new",
        row(" ".join(FRESH.split()[:12])),
        row(TEMPLATE.format(text=" some other words"), "shipping"),
    )
    tested = suite(
        ws, "teams", (LONG, "returns"), (OTHER, "shipping"), (FRESH, "shipping"), (THIRD, "returns")
    )
    base = grow(ws, "base@v1", below, model="base")
    first = grow(ws, "support@v1", old, base=base.digest)
    second = grow(ws, f"support@v{first.number}", new)

    report = ancestry_overlap(ws.store, second, tested)
    assert [(m.item, m.kind, m.answer) for m in report.found] == [
        ("teams/i0", "ngram", True),
        ("teams/i1", "ngram", False),
    ]
    assert [(r.data, r.row) for m in report.found for r in m.first] == [
        ("old@v1", "old-0"),
        ("below@v1", "below-0"),
    ]
    assert [match.share for match in report.found] == [1.0, 1.0]
    assert {(c.label, c.rows) for c in report.checked} == {("old@v1", 2), ("below@v1", 1), ("new@v1", 2)}
    assert (report.items, report.searched, report.blank, report.complete) == (4, 4, 0, True)
    assert report.unrecorded == ("base@v1",)  # support@v1 is its base as it is
    assert ancestry_overlap(ws.store, second, tested, ngram=12).found[-1].item == "teams/i2"
    assert not ancestry_overlap(ws.store, ws.version("support@v1"), tested).found


def test_the_report_as_a_document_is_capped_and_its_counts_are_true(ws):
    tested = suite(ws, "teams", (LONG, "returns"), (OTHER, "shipping"))
    learned = data(
        ws, "d", *[row(f"{n} {LONG}", "shipping") for n in range(8)], row(f"x {OTHER}", "shipping")
    )
    report = ancestry_overlap(ws.store, grow(ws, "support@v1", learned), tested)
    document = json.loads(json.dumps(report.to_document(most=1)))
    assert (document["contaminated"], document["with_answer"], document["exact"]) == (2, 1, 0)
    (listed,) = document["found"]
    assert listed["item"] == "teams/i1" and listed["answer"]  # the worst first
    assert [(m.rows, len(m.first)) for m in report.found] == [(1, 1), (8, 5)]
    assert LONG not in json.dumps(report.to_document())


def test_equal_inputs_in_data_that_came_before_the_check(ws, monkeypatch):
    monkeypatch.setattr("meristem.evaluation.contamination.leaks", lambda *_: [])
    learned = data(ws, "d", row("Where is it ?", "shipping"))
    tested = suite(ws, "teams", ("where  IS it", "shipping"))
    report = ancestry_overlap(ws.store, grow(ws, "support@v1", learned), tested)
    (match,) = report.found
    assert (match.kind, match.answer, report.searched) == ("exact", True, 0)


def test_data_that_were_deleted_are_said_and_not_passed_over(ws):
    learned = data(ws, "d", row(f"x {LONG}"))
    kept = data(ws, "k", row(f"x {OTHER}"))
    version = grow(ws, "support@v1", learned, kept)
    tested = suite(ws, "teams", (LONG, "returns"))
    assert ancestry_overlap(ws.store, version, tested).found
    ws.delete_data("d", "asked for by the person")
    report = ancestry_overlap(ws.store, version, tested)
    assert not report.found and not report.complete
    (gone,) = report.unchecked
    assert gone.label == "d@v1" and gone.why.startswith("deleted by event ")
    assert [c.label for c in report.checked] == ["k@v1"]


def test_several_suites_in_one_reading_give_the_same_reports(ws):
    learned = data(ws, "d", row(f"x {LONG}"), row(f"x {OTHER}"))
    version = grow(ws, "support@v1", learned)
    suites = [suite(ws, "one", (LONG, "returns")), suite(ws, "two", (OTHER, "returns"), (LONG, "shipping"))]
    told = []
    reports = ancestry_overlaps(ws.store, version, suites, progress=lambda *step: told.append(step))
    assert reports == [ancestry_overlap(ws.store, version, entry) for entry in suites]
    assert told[-1][1:3] == (2, 2) and "training data of support@v2" in told[-1][0]


def test_perplexity_items_are_texts_without_an_answer(ws):
    path = ws.root.parent / "ppl.yaml"
    acme.lines(ws.root.parent / "ppl.jsonl", [{"id": "t", "text": LONG}, {"id": "u", "text": THIRD}])
    path.write_text(
        "name: ppl\ntasks:\n  - {name: p, type: perplexity, data: ppl.jsonl, metric: bits_per_byte, kind: general}\n"
    )
    tested = ws.add_suite("ppl", path)
    learned = data(ws, "d", {"text": f"Once more: {LONG}."})
    (match,) = ancestry_overlap(ws.store, grow(ws, "support@v1", learned), tested).found
    assert (match.item, match.kind, match.answer) == ("p/t", "ngram", None)


@pytest.mark.parametrize("ngram", [2, 101])
def test_an_ngram_of_no_use_is_refused(ws, ngram):
    with pytest.raises(BadInput, match="an n-gram has 3 to 100 words"):
        ancestry_overlap(ws.store, ws.version("support"), ws.asset("suite", "a"), ngram=ngram)


def test_weights_from_a_folder_have_no_recorded_data(ws, tmp_path):
    other = ws.commit("support", acme.model_folder(tmp_path / "made", scale=0.2))
    with ws.store.database.read() as connection:
        assert lineage.learned(connection, other) == lineage.Learned((), ("base@v1", other.label))


def test_the_texts_here_share_no_thirteen_words():
    texts = [words(t) for t in (LONG, OTHER, FRESH, THIRD)]
    assert (
        all(len(t) >= 13 for t in texts) and len({tuple(t[i : i + 5]) for t in texts for i in range(9)}) == 36
    )
