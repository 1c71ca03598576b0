"""Evaluations and comparisons of a workspace as files: asks the workspace, and picks the writer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meristem.evaluation.exports import junit, markdown
from meristem.evaluation.exports.document import Measured, measured
from meristem.evaluation.exports.formats import evaluation_text, json_text
from meristem.web.compare import comparison_page, evaluation_page
from meristem.web.compare_data import comparison_view, evaluation_view
from meristem.web.pages import write_text

if TYPE_CHECKING:
    from meristem.ecosystem.versions import VersionEntry
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.contamination import ContaminationReport
    from meristem.evaluation.exports.finding import Finding
    from meristem.workspace import Workspace


def evaluation_export(
    ws: Workspace, reference: str | VersionEntry, suite: str, format: str, dataset: str | None = None
) -> str:
    """One evaluation, measured now if it was not before, as text in one of ``formats.EVALUATION``."""
    found = _measured(ws, reference, suite)
    return (
        evaluation_page(evaluation_view(found))
        if format == "html"
        else evaluation_text(found, format, dataset)
    )


def write_comparison(
    ws: Workspace,
    new: str | VersionEntry,
    old: str | VersionEntry,
    suite: str,
    path: Path,
    format: str,
    comparison: Comparison,
    told: Finding,
    margin: float | None = None,
    contamination: ContaminationReport | None = None,
) -> Path:
    """Write a comparison that was just made to ``path`` in one of ``formats.COMPARISON``."""
    before, after = _measured(ws, old, suite), _measured(ws, new, suite)
    if format == "html":
        view = comparison_view(before, after, comparison, told, margin, contamination)
        text = comparison_page(view)
    elif format == "junit":
        text = junit.comparison_junit(before, after, comparison)
    elif format == "markdown":
        text = markdown.comparison_markdown(before, after, comparison, told)
    else:
        text = json_text(
            {
                **comparison.to_document(),
                "outcome": told.outcome,
                "places": list(told.places),
                "verdict": told.verdict.to_document() if told.verdict else None,
                "contamination": contamination.to_document() if contamination else None,
                "old": before.to_document(),
                "new": after.to_document(),
            }
        )
    return write_text(text, path)


def _measured(ws: Workspace, reference: str | VersionEntry, suite: str) -> Measured:
    version, asset = ws.version(reference), ws.asset("suite", suite)
    return measured(ws.store, version, asset, ws.evaluate(version, suite))
