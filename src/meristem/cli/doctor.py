"""``meristem doctor``"""

from __future__ import annotations

from dataclasses import asdict

import typer

from meristem.cli.options import JSON, _folder, show


def doctor(as_json: JSON = False) -> None:
    """Is the workspace healthy, and how is each fault mended? Exit 1: a problem; 5: the store is out of reach."""
    from meristem.cli.progress import bars
    from meristem.workspace import Workspace

    with bars() as progress:
        health = Workspace.doctor(_folder(), progress)
    lines = []
    for finding in health.findings:
        lines.append(f"{finding.status:<8} {finding.check:<14} {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<24}mend: {finding.remedy}")
    lines.append(f"{health.problems} problems, {health.warnings} warnings")
    document = {"exit_code": health.exit_code, "checks": [asdict(finding) for finding in health.findings]}
    show(as_json, document, "\n".join(lines))
    raise typer.Exit(health.exit_code)
