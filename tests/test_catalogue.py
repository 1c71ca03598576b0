"""The catalogue record: enough ids, each with code and a test that exist and belong together."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meristem.catalogue import entries

ROOT = Path(__file__).parent.parent
# A test from outside reaches these modules through a verb of the workspace, or the name that a suite calls them by.
VERBS = {
    "meristem.workspace": "ms.Workspace.open(",
    "meristem.evaluation.tasks.harness.inspect_task": "inspect:",
    "meristem.assessment": ".compare(",
    "meristem.loop": ".turn(",
    "meristem.monitoring.signals": ".signal(",
    "meristem.evaluation.matrix": ".task_matrix(",
    "meristem.release.criteria": ".propose(",
}


def test_every_claim_names_code_and_a_test_file_with_tests() -> None:
    found = entries()
    assert len(found) >= 25
    for entry in found:
        assert set(entry) == {"id", "code", "test"}
        assert (ROOT / entry["code"]).is_file(), entry
        assert re.search(r"^def test_", (ROOT / entry["test"]).read_text(), re.MULTILINE), entry


@pytest.mark.parametrize("entry", entries(), ids=[entry["id"] for entry in entries()])
def test_code_and_test_belong_together(entry: dict[str, str]) -> None:
    """The test imports the module, or something of it by its public name, or calls the verb that leads to it."""
    module = entry["code"].removeprefix("src/").removesuffix(".py").replace("/", ".")
    test = ROOT / entry["test"]
    verb = VERBS.get(module)
    assert module in imported(test) or (verb is not None and verb in test.read_text()), entry


def imported(file: Path) -> set[str]:
    """The modules of Meristem that a test file, or a helper of the tests that it imports, names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.startswith("tests."):
            helper = ROOT / f"{node.module.replace('.', '/')}.py"
            found |= imported(helper) if helper.exists() else set()
        if node.module.partition(".")[0] == "meristem":
            home = importlib.import_module(node.module)
            found.add(node.module)
            for alias in node.names:
                thing = getattr(home, alias.name, None)
                found |= {f"{node.module}.{alias.name}", str(getattr(thing, "__module__", ""))}
    return found


def test_the_command_prints_the_same_as_json() -> None:
    command = [str(Path(sys.executable).parent / "meristem"), "catalogue", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == entries()
