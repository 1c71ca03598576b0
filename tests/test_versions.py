"""The oldest supported versions: the floors in pyproject.toml are what `make oldest` runs the seam's tests on."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_floors_are_the_oldest_versions_tested():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        wanted = tomllib.load(stream)["project"]["optional-dependencies"]["train"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)
    oldest = pinned("constraints-oldest.txt")
    for name in ("accelerate", "datasets", "peft", "transformers", "trl"):
        assert oldest[name] == floors[name] + ".0", name


def test_these_tests_run_on_the_versions_that_they_are_meant_for():
    oldest = pinned("constraints-oldest.txt")
    installed = {name: version(name) for name in oldest}
    assert (installed == oldest) == bool(os.environ.get("MERISTEM_OLDEST")), installed
