"""The suite that `docs/evaluation.md` shows is one that Meristem reads, and its list of types is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from tests import acme

from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.tasks.base import registered
from meristem.evaluation.tasks.generate import Metric

DOCS = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
ROWS = {
    "routing": {"text": "I was charged twice.", "answer": "billing", "slice": "plain"},
    "routing-examples": {"text": "Where is it?", "answer": "shipping"},
    "orders": {"prompt": "Two cups for Ann.", "answer": {"item": "cup", "count": 2}},
    "sums": {"prompt": "1 + 1 =", "answer": 2},
    "tone": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
}


def test_the_suite_of_the_documentation_is_read(tmp_path):
    for name, row in ROWS.items():
        rows = [row, {**row, "text": "Is it here?"}] if name == "routing-examples" else [row]
        acme.lines(tmp_path / f"{name}.jsonl", rows)
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    judge = "  - name: polite\n    type: generate\n    kind: general\n    data: orders2.jsonl\n" + blocks[1]
    acme.lines(tmp_path / "orders2.jsonl", [{"prompt": "Two cups for Ann."}])
    (tmp_path / "suite.yaml").write_text(blocks[0] + judge)
    suite = load_suite(tmp_path / "suite.yaml")
    assert [task.metric for task in suite.tasks] == ["accuracy", "json", "numeric", "accuracy", "judge"]
    assert len(suite.tasks[0].shots) == 4


def test_every_type_and_metric_is_documented():
    for name in registered():
        assert f"`{name}" in DOCS
    for metric in get_args(Metric):
        assert f"| `{metric}` |" in DOCS
