"""The formats by name and by the ending of a file, and the text of an evaluation in each but HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.exports import hub, junit, markdown
from meristem.evaluation.exports.document import Measured

ENDINGS = {
    "json": (".json",),
    "junit": (".xml",),
    "markdown": (".md", ".markdown"),
    "html": (".html", ".htm"),
    "hf": (".yaml", ".yml"),
    "model-card": (),
}
EVALUATION = tuple(ENDINGS)
COMPARISON = ("json", "junit", "markdown", "html")


def format_of(name: str | None, to: Path | None, allowed: Sequence[str], default: str = "json") -> str:
    """The format called ``name``, else that of the file's ending, else ``default`` when there is no file."""
    if name is not None:
        if name not in allowed:
            raise BadInput(f"--format {name!r} is unknown; formats: {', '.join(allowed)}")
        return name
    if to is None:
        return default
    found = next((key for key in allowed if to.suffix.lower() in ENDINGS[key]), None)
    if found is None:
        if to.is_dir():
            raise BadInput.at(to, None, "a folder; name a file in it")
        known = ", ".join(ending for key in allowed for ending in ENDINGS[key])
        raise BadInput(f"{to}: the ending names no format; use one of {known}")
    return found


def evaluation_text(found: Measured, name: str, dataset: str | None = None) -> str:
    """``dataset``: the Hub's id of the data set behind the suite, for ``hf`` and ``model-card``."""
    if dataset is not None and name not in ("hf", "model-card"):
        raise BadInput("--dataset belongs to the formats hf and model-card")
    if name == "json":
        return json_text(found.to_document())
    if name == "junit":
        return junit.evaluation_junit(found)
    if name == "markdown":
        return markdown.evaluation_markdown(found)
    return hub.eval_results_yaml(found, dataset) if name == "hf" else hub.model_card(found, dataset)


def json_text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
