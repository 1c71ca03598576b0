"""JUnit XML: a test suite per task, a test case per item, as Jenkins, GitLab and GitHub's actions read it.

Only what every dialect allows is used: ``testsuites > testsuite > properties, testcase > failure, system-out``.
Scores and slices of a case stand in its ``system-out``, since Jenkins' schema knows no properties of a case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from meristem.evaluation.comparison import Comparison
from meristem.evaluation.exports.document import Measured, is_right
from meristem.evaluation.results import ItemResult

# What XML 1.0 cannot hold at all, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """``failure``: a short message when the case failed; ``text``: what else there is to say."""

    task: str
    name: str
    failure: str | None
    text: str


def evaluation_junit(found: Measured) -> str:
    """A wrong item (a score below one half) is a failure; items in other units than shares never fail."""
    cases = [_case(row) for row in found.results]
    return _xml(found.asset.label, _properties(found, ""), cases, found.entry.seconds, _stamp(found))


def comparison_junit(old: Measured, new: Measured, comparison: Comparison) -> str:
    """A case per item of ``new``; only an item that went from right to wrong is a failure."""
    flipped, before = set(comparison.flipped), {(row["task"], row["id"]): row for row in old.results}
    cases = []
    for row in new.results:
        was = before[row["task"], row["id"]]
        regressed = f"{row['task']}/{row['id']}" in flipped
        failure = f"right with {old.version.label}, wrong with {new.version.label}" if regressed else None
        text = f"old score: {was['score']:.6g}\nold prediction: {was['prediction']}\n{_told(row)}"
        cases.append(Case(row["task"], row["id"], failure, text))
    properties = _properties(old, "old.") | _properties(new, "new.")
    low, high = comparison.interval
    properties |= {
        "difference": f"{comparison.difference:.6f}",
        "interval": f"{low:.6f} to {high:.6f} at {comparison.confidence:.0%}",
    }
    name = f"{new.version.label} against {old.version.label} on {new.asset.label}"
    return _xml(name, properties, cases, new.entry.seconds, _stamp(new))


def _case(row: ItemResult) -> Case:
    failure = None if is_right(row) else f"expected {row['answer']!r}, got {row['prediction']!r}"
    return Case(row["task"], row["id"], failure, _told(row))


def _told(row: ItemResult) -> str:
    lines = [f"score: {row['score']:.6g}"]
    lines += [f"slice: {row['slice']}"] if row["slice"] else []
    return "\n".join([*lines, f"prediction: {row['prediction']}", f"answer: {row['answer']}"])


def _properties(found: Measured, prefix: str) -> dict[str, str]:
    names = {
        "version": found.version.label,
        "version digest": found.version.digest,
        "content": found.version.content,
        "suite": found.asset.label,
        "suite digest": found.entry.record.suite,
        "engine": found.entry.record.engine,
        "evaluation": found.entry.digest,
        "tool": found.event.tool if found.event else "",
    }
    return {f"{prefix}{key}": value for key, value in names.items() if value}


def _stamp(found: Measured) -> str | None:
    """Seconds of ISO 8601 without a zone, as the schemas want it; UTC."""
    return found.event.time[:19] if found.event else None


def _xml(
    name: str, properties: Mapping[str, str], cases: Sequence[Case], seconds: float, stamp: str | None
) -> str:
    root = ET.Element("testsuites", {"name": _legal(name), "time": f"{seconds:.3f}", **_counts(cases)})
    for task in dict.fromkeys(case.task for case in cases):
        mine = [case for case in cases if case.task == task]
        share = seconds * len(mine) / len(cases)
        told = {"name": _legal(task), "time": f"{share:.3f}", "skipped": "0", **_counts(mine)}
        suite = ET.SubElement(root, "testsuite", told)
        if stamp:
            suite.set("timestamp", stamp)
        listed = ET.SubElement(suite, "properties")
        for key, value in properties.items():
            ET.SubElement(listed, "property", name=key, value=_legal(value))
        for case in mine:
            _add(suite, name, case)
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add(suite: ET.Element, name: str, case: Case) -> None:
    made = ET.SubElement(suite, "testcase", name=_legal(case.name), classname=_legal(f"{name}.{case.task}"))
    if case.failure is not None:
        failure = ET.SubElement(made, "failure", message=_legal(case.failure[:300]), type="wrong")
        failure.text = _legal(case.text)
    else:
        ET.SubElement(made, "system-out").text = _legal(case.text)


def _counts(cases: Iterable[Case]) -> dict[str, str]:
    found = list(cases)
    failed = sum(case.failure is not None for case in found)
    return {"tests": str(len(found)), "failures": str(failed), "errors": "0"}


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
