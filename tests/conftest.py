"""One tiny workspace is built and trained once per session; a test that changes it gets its own copy."""

from __future__ import annotations

import gc
import os
import shutil

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: its threads cost more than they give on tiny models

import pytest
from tests import acme

pytest_plugins = ["tests.servers"]


def pytest_collection_finish():
    """Every train() ends in gc.collect(), which would walk all that the tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def origin(tmp_path_factory):
    """Models, suites and data in place; nothing trained: ``support@v1`` is the champion."""
    import torch

    import meristem as ms

    torch.set_num_threads(1)
    folder = acme.company(tmp_path_factory.mktemp("origin"))
    files = folder.parent / "files"
    ws = ms.Workspace.create(folder, actor="kim")
    ws.add_model("base", tier="foundation", source=str(files / "model"))
    ws.add_model("support", tier="industrial", base="base")
    for task in "ab":
        ws.add_suite(task, files / f"{task}.yaml")
        ws.add_data(task, files / f"{task}.jsonl")
    ws.close()
    return folder


@pytest.fixture(scope="session")
def released(origin, tmp_path_factory):
    """Task a learned and released: ``support@v2`` is the champion, by update-1 and decision-1."""
    import meristem as ms

    folder = tmp_path_factory.mktemp("released") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    ws.promote(ws.propose(ws.update("support", data=["a"], methods=acme.REPLAY_AND_EWC).version))
    ws.close()
    return folder


@pytest.fixture(scope="session")
def trained(released, tmp_path_factory):
    """Two candidates against v2: v3 forgot a (update-2, decision-2 fails), v4 kept it (update-3, decision-3)."""
    import meristem as ms

    folder = tmp_path_factory.mktemp("trained") / "ws"
    shutil.copytree(released, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    for methods in ([], acme.REPLAY_AND_EWC):
        ws.propose(ws.update("support", data=["b"], methods=methods).version)
    assert [e.status for e in ws.records("decision")] == ["pass", "fail", "pass"]
    ws.close()
    return folder


@pytest.fixture
def copy(tmp_path):
    """``copy(folder)``: a private copy of a workspace folder."""

    def make(folder, name="ws"):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def fresh(origin, copy):
    """A folder to change: nothing trained yet."""
    return copy(origin)


@pytest.fixture
def grown(trained, copy):
    """A folder to change: v2 is the champion, v3 failed, v4 passed."""
    return copy(trained)


@pytest.fixture
def files(origin):
    """The files that a user would bring."""
    return origin.parent / "files"
