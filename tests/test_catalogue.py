"""The catalogue record: enough ids, each with code and a test that exist and belong together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from meristem.catalogue import entries

ROOT = Path(__file__).parent.parent


def test_every_claim_names_code_and_a_test_file_with_tests() -> None:
    found = entries()
    assert len(found) >= 25
    for entry in found:
        assert set(entry) == {"id", "code", "test"}
        assert (ROOT / entry["code"]).is_file(), entry
        assert re.search(r"^def test_", (ROOT / entry["test"]).read_text(), re.MULTILINE), entry


def test_the_command_prints_the_same_as_json() -> None:
    command = [str(Path(sys.executable).parent / "meristem"), "catalogue", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == entries()
