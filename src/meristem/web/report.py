"""``write_report``: one self-contained HTML page about a model, for people who must answer for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from meristem.web.lineage import lineage
from meristem.web.pages import render_page, write_text
from meristem.web.report_data import Snapshot, snapshot, standing
from meristem.web.report_decisions import decisions, latest_sentence
from meristem.web.report_runs import MOST_EVENTS, Return, Run, costs, runs, trail, way_back
from meristem.web.report_scores import scores
from meristem.workspace import Workspace

OPEN_EVENTS = 30
OPEN_FLIPS = 3
OPEN_DECISIONS = 5


def write_report(ws: Workspace, model: str, path: Path) -> Path:
    """Write the report on ``model`` to ``path`` and return it. The same workspace gives the same bytes.

    Nothing is evaluated or recorded: only what the store holds is shown. Raises ``BadInput`` for an unknown
    model and ``EnvironmentFailure`` when the file cannot be written.
    """
    return write_text(render(ws, model), Path(path))


def render(ws: Workspace, model: str) -> str:
    """The page as text."""
    return render_page("report.html.j2", **_context(snapshot(ws, model)))


def _context(data: Snapshot) -> dict[str, Any]:
    found_runs, spent = runs(data), costs(data)
    back = way_back(data)
    return {
        "data": data,
        "open_events": OPEN_EVENTS,
        "open_flips": OPEN_FLIPS,
        "open_decisions": OPEN_DECISIONS,
        "sentence": latest_sentence(data),
        "latest": data.decisions[-1] if data.decisions else None,
        "undone": _undone(data),
        "last_event": data.events[-1] if data.events else None,
        "lineage": lineage(data),
        "standings": {version.digest: standing(data, version) for version in data.own_versions},
        "scores": scores(data),
        "decisions": decisions(data),
        "gates_used": list(dict.fromkeys(gate.gate for found in data.decisions for gate in found.gates)),
        "runs": found_runs,
        "most_steps": _most_steps(found_runs),
        "costs": spent,
        "seconds": sum(cost.seconds or 0.0 for cost in spent),
        "steps": sum(cost.steps or 0 for cost in spent),
        "tokens": sum(cost.tokens or 0 for cost in spent),
        "items": sum(cost.items or 0 for cost in spent),
        "trail": trail(data),
        "most_events": MOST_EVENTS,
        "back": back,
        "commands": _commands(data, back),
    }


def _undone(data: Snapshot) -> bool:
    """Whether the version of the latest decision was rolled back: then its verdict gets no green."""
    if not data.decisions:
        return False
    return standing(data, data.versions[data.decisions[-1].record.version]).key == "rolled-back"


def _most_steps(found: list[Run]) -> float:
    series = [points for run in found for points in (run.loss, *run.penalties.values())]
    return max((x for points in series for x, _ in points), default=1.0)


def _commands(data: Snapshot, back: Return | None) -> dict[str, str]:
    start = f"meristem --workspace {shlex.quote(data.ws.root.resolve().name)}"
    commands = {"verify": f"{start} log verify --head {data.audit.head}"}
    if back:
        commands["rollback"] = f"{start} release rollback {data.model.name} --to {back.target} --reason 'WHY'"
    return commands
