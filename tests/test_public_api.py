"""Importing Meristem is cheap: nothing heavy until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "scipy", "sqlalchemy")


@pytest.mark.parametrize("module", ["meristem", "meristem.methods", "meristem.cli.main"])
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_public_name_exists_and_unknown_ones_are_refused() -> None:
    import meristem

    for name in meristem.__all__:
        assert getattr(meristem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = meristem.nothing
