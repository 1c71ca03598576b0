"""Kill anywhere, short: an even sample of points per operation. All of them: ``python -m benchmarks.kill_sweep``."""

from __future__ import annotations

import itertools
import os

import pytest
from tests.crash.nursery import usable
from tests.crash.operations import OPERATIONS
from tests.crash.sweep import KINDS, Sweep

PER_OPERATION = 20
_SYNCED = ("fsync", "fdatasync", "rename", "renameat", "renameat2")

pytestmark = pytest.mark.strace


@pytest.fixture(autouse=True)
def strace():
    if why := usable():
        if "strace" in os.environ.get("MERISTEM_REQUIRE", ""):
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture
def swept(tmp_path):
    """``swept(operation, bug)``: the operation, ready to be disturbed."""
    made = []

    def make(name, bug=""):
        made.append(Sweep(OPERATIONS[name], tmp_path / f"sweep-{len(made)}", bug))
        return made[-1]

    yield make
    for sweep in made:
        sweep.close()


def found(swept):
    return [
        f"{one.point}, {one.kind}: {one.problems or 'missed'}" for one in swept if one.problems or one.missed
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_lost(swept, name):
    """Whatever it dies of, and wherever: the workspace is whole, and the same command finishes."""
    sweep = swept(name)
    assert sweep.sync_problems == []
    step = max(1, len(sweep.points) // PER_OPERATION)
    sample = zip(sweep.points[::step], itertools.cycle(KINDS), strict=False)
    assert found(sweep.run(p, kind if kind in sweep.kinds(p) else "before") for p, kind in sample) == []


def test_a_pointer_before_its_pack_is_found(swept):
    sweep = swept("model add", "pointer_before_pack")
    renames = [point for point in sweep.points if point.name in _SYNCED]
    problems = found(sweep.run(point, "before") for point in renames)
    assert any("missing" in problem for problem in problems)


@pytest.mark.parametrize(
    ("bug", "told"),
    [
        ("pointer_before_pack", "the database names it before it has its name"),
        ("pack_not_synced", "gets its name before its bytes are synced"),
        ("folder_not_synced", "its folder is not synced"),
        ("commit_not_synced", "the database's log is not synced"),
    ],
)
def test_a_missing_sync_is_found(swept, bug, told):
    """SIGKILL loses nothing of this; the order of calls in the trace tells."""
    assert told in " ".join(swept("model add", bug).sync_problems)
