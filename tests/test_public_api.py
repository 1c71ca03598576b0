"""Importing Meristem is cheap: nothing heavy until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "scipy", "sqlalchemy")


@pytest.mark.parametrize(
    "use", ["import meristem", "import meristem.methods", "from meristem.cli.main import build; build()"]
)
def test_nothing_heavy_is_loaded_before_it_is_used(use: str) -> None:
    code = f"import sys; {use}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_public_name_exists_and_unknown_ones_are_refused() -> None:
    import meristem

    for name in meristem.__all__:
        assert getattr(meristem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = meristem.nothing
