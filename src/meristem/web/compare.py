"""The pages of ``eval compare`` and ``eval export``: self-contained HTML about two versions, or about one."""

from __future__ import annotations

from meristem.web.compare_data import MOST_CHANGES, ComparisonView, EvaluationView, engine_settings
from meristem.web.pages import render_page

OPEN_CHANGES = 5


def comparison_page(view: ComparisonView) -> str:
    """Verdict, scores, changed answers, cost and identity. The same view gives the same bytes."""
    return render_page(
        "compare.html.j2",
        view=view,
        settings=engine_settings(view.new.found),
        open_changes=OPEN_CHANGES,
        most_changes=MOST_CHANGES,
    )


def evaluation_page(view: EvaluationView) -> str:
    """One evaluation with all of its items, wrong ones first."""
    return render_page("evaluation.html.j2", view=view, settings=engine_settings(view.side.found))
