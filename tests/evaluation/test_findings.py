"""What a comparison says about releasing: one outcome, one exit code, and sentences with its own numbers."""

from __future__ import annotations

import pytest

from meristem.evaluation.comparison import Comparison, compare
from meristem.evaluation.exports.finding import Finding, finding


def compared(pairs: list[tuple[float, float]], slices: list[str] | None = None, **more: str) -> Comparison:
    """The comparison of items with these (old, new) scores."""

    def rows(side: int) -> list[dict]:
        return [
            {
                "task": "t",
                "id": str(at),
                "slice": slices[at] if slices else None,
                "score": pair[side],
                "prediction": "",
                "answer": "",
                "detail": {},
                **more,
            }
            for at, pair in enumerate(pairs)
        ]

    return compare(old=rows(0), new=rows(1))  # type: ignore[arg-type]


def told(pairs: list[tuple[float, float]], margin: float | None = None, **more: object) -> Finding:
    return finding(compared(pairs, **more), "m@v2", "m@v1", margin)  # type: ignore[arg-type]


LOST, WON, KEPT, MISSED = (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)


def test_a_loss_is_a_regression():
    found = told([LOST] * 30 + [KEPT] * 70)
    assert (found.outcome, found.exit_code, found.settle) == ("regression", 1, "")
    assert found.sentence == (
        "m@v2 is worse than m@v1: the score fell from 100.0 % to 70.0 % on 100 items, more than chance explains."
    )


def test_a_gain_is_none():
    found = told([WON] * 30 + [KEPT] * 70)
    assert (found.outcome, found.exit_code) == ("none", 0) and "is better than m@v1" in found.sentence


def test_no_change_says_what_is_still_open():
    found = told([LOST] * 2 + [WON] * 2 + [KEPT] * 96)
    assert (found.outcome, found.exit_code) == ("none", 0)
    assert found.sentence.startswith("No regression found: from m@v1 to m@v2 the score stayed at 98.0 %")
    assert (
        "A loss of up to" in found.settle
        and "items, at a margin of 2 points, would settle it." in found.settle
    )


def test_a_slice_that_fell_is_a_regression_although_the_total_gained():
    pairs = [LOST] * 15 + [KEPT] * 5 + [WON] * 40 + [KEPT] * 40
    found = told(pairs, slices=["rare"] * 20 + ["usual"] * 80)
    assert (found.outcome, found.places) == ("regression", ("slice rare",))
    assert "on slice rare; over all, the score rose from 60.0 % to 85.0 %" in found.sentence
    # A margin that the total keeps does not excuse the slice.
    assert told(pairs, 0.02, slices=["rare"] * 20 + ["usual"] * 80).exit_code == 1


@pytest.mark.parametrize(
    ("pairs", "margin", "outcome", "code"),
    [
        ([KEPT] * 300, 0.02, "none", 0),
        ([KEPT] * 20, 0.02, "unknown", 3),
        ([LOST] * 30 + [KEPT] * 70, 0.02, "regression", 1),
        ([LOST] * 3 + [WON] * 2 + [KEPT] * 45, 0.05, "unknown", 3),
    ],
)
def test_a_margin_asks_for_proof(pairs, margin, outcome, code):
    found = told(pairs, margin)
    assert (found.outcome, found.exit_code) == (outcome, code)
    assert found.verdict is not None
    if outcome == "unknown":
        assert (
            found.verdict.needed and f"About {found.verdict.needed:,} items would settle it." in found.settle
        )


def test_nothing_can_be_said_of_two_items_in_a_unit():
    found = told([(-1.0, -1.2), (-1.0, -1.1)], unit="bits_per_byte")
    assert (found.outcome, found.exit_code) == ("unknown", 3) and found.sentence.startswith("Cannot tell")


def test_bits_per_byte_read_the_other_way_round():
    found = told([(-0.90 - i / 1000, -0.95 - i / 900) for i in range(40)], unit="bits_per_byte")
    assert found.outcome == "regression"
    assert "the score rose from 0.9195 to 0.9717 bits per byte" in found.sentence


def test_many_places_are_counted():
    pairs = ([LOST] * 15 + [KEPT] * 5) * 6
    found = told(pairs, slices=[name for name in "abcdef" for _ in range(20)])
    assert "Certain losses: slices a, b, c, d and 2 more." in found.sentence


def test_a_slice_of_every_item_is_the_whole_and_judged_as_the_whole():
    """10 losses and 3 gains: one-sided p = 0.046, but the two-sided interval of the total holds 0."""
    pairs = [LOST] * 10 + [WON] * 3 + [KEPT] * 87
    plain, named = told(pairs), told(pairs, slices=["only"] * 100)
    assert compared(pairs, ["only"] * 100).slices[0].regressed
    assert (plain.outcome, plain.places) == (named.outcome, named.places) == ("none", ())
