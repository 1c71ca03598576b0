"""Markdown: an evaluation as a file to keep, a comparison as a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from meristem.evaluation.comparison import Comparison
from meristem.evaluation.exports.document import Measured
from meristem.evaluation.exports.finding import Finding
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.results import ItemResult

MOST_FLIPS = 25  # a comment on a pull request has an end
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def evaluation_markdown(found: Measured) -> str:
    summary, event = found.entry.record.summary, found.event
    shown = scale(summary.get("unit"))
    parts = [
        f"# {_text(found.version.label)} on {_text(found.asset.label)}",
        f"**{shown.score(summary['score'])}** over {summary['items']} items: {shown.words}.",
        _table(
            ("", "score"),
            [
                *((f"task {name}", shown.score(score)) for name, score in summary["tasks"].items()),
                *((f"slice {name}", shown.score(score)) for name, score in summary["slices"].items()),
            ],
        ),
        "## What was measured",
        _table(
            ("", ""),
            [
                *_identity(found),
                ("measured", f"{event.time} by {event.actor} with {event.tool}" if event else "unknown"),
                ("took", f"{found.entry.seconds:.1f} s"),
            ],
        ),
        "## Items",
        _table(
            ("task", "id", "slice", "score", "prediction", "answer"),
            [
                (
                    r["task"],
                    r["id"],
                    r["slice"] or "",
                    f"{shown.sign * r['score']:.4g}",
                    r["prediction"],
                    r["answer"],
                )
                for r in found.results
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def comparison_markdown(old: Measured, new: Measured, comparison: Comparison, told: Finding) -> str:
    shown = scale(comparison.unit)
    low, high = map(shown.difference, comparison.interval)
    interval = comparison.unproven or f"{comparison.confidence:.0%} interval {low} to {high}"
    parts = [
        f"# {_text(new.version.label)} against {_text(old.version.label)} on {_text(new.asset.label)}",
        f"**{_text(told.sentence, 600)}** {_text(told.settle, 600)}".rstrip(),
        f"Score {shown.score(comparison.old_score)} → {shown.score(comparison.new_score)}, difference "
        f"{shown.difference(comparison.difference)} {shown.difference_unit} ({_text(interval)}) over "
        f"{comparison.n} items. {shown.words[0].upper()}{shown.words[1:]}.",
        _table(
            ("", "items", "old", "new", "difference", "right → wrong", "wrong → right", "p worse (Holm)", ""),
            [
                (
                    f"{kind} {group.name}",
                    group.n,
                    shown.score(group.old_score),
                    shown.score(group.new_score),
                    shown.difference(group.difference),
                    "" if group.flipped is None else group.flipped,
                    "" if group.gained is None else group.gained,
                    "" if group.p_adjusted is None else f"{group.p_adjusted:.3g}",
                    "worse" if group.regressed else "too few" if group.too_few else "",
                )
                for kind, groups in (("task", comparison.tasks), ("slice", comparison.slices))
                for group in groups
            ],
        ),
        *_flips(old, new, comparison),
        "## What was compared",
        _table(
            ("", "old", "new"),
            [
                (name, before, after)
                for (name, before), (_, after) in zip(_identity(old), _identity(new), strict=True)
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _flips(old: Measured, new: Measured, comparison: Comparison) -> list[str]:
    if not comparison.flipped:
        return []
    before, after = _by_name(old.results), _by_name(new.results)
    shown = comparison.flipped[:MOST_FLIPS]
    more = len(comparison.flipped) - len(shown)
    rows = [
        (name, after[name]["answer"], before[name]["prediction"], after[name]["prediction"]) for name in shown
    ]
    made = [f"## Right before, wrong now ({len(comparison.flipped)})"]
    made.append(_table(("item", "answer", "old prediction", "new prediction"), rows))
    return [*made, f"{more} more."] if more else made


def _by_name(results: Iterable[ItemResult]) -> dict[str, ItemResult]:
    return {f"{row['task']}/{row['id']}": row for row in results}


def _identity(found: Measured) -> list[tuple[str, str]]:
    record = found.entry.record
    return [
        ("version", f"{found.version.label} {found.version.digest}"),
        ("content", found.version.content),
        ("suite", f"{found.asset.label} {record.suite}"),
        ("engine", record.engine),
        ("evaluation", found.entry.digest),
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_text(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(words: str, most: int = 160) -> str:
    """One line of plain text: nothing in it is markup, a table's bar or HTML."""
    flat = " ".join(words.split())
    return _SPECIAL.sub(r"\\\1", flat if len(flat) <= most else flat[: most - 1] + "…")
