"""The tiny stream's data, its protocols by name, and one whole run of it."""

from __future__ import annotations

import pytest
from tests import acme
from tests.bench import tiny_stream

from meristem.bench import protocols, session


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return acme.model_folder(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return tiny_stream.data_folder(tmp_path_factory.mktemp("bench-data"))


@pytest.fixture(autouse=True, scope="session")
def tiny_protocols():
    patch = pytest.MonkeyPatch()
    for made in (tiny_stream.TINY, tiny_stream.TEXT, tiny_stream.PAIRS):
        patch.setitem(protocols.PROTOCOLS, made.name, made)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def request_for(tiny_data, tiny_model):
    """``request_for(protocol, *methods, **other)``"""

    def make(protocol="tiny-2", *methods, **other):
        chosen = {"data": tiny_data, "model": str(tiny_model), "train": 16, "test": 10, **other}
        return session.Request(protocol=protocol, methods=methods or ("sequential",), **chosen)

    return make


@pytest.fixture(scope="session")
def run_bench():
    """``run_bench(request, out)``: every run with its result and whether it was there before."""
    import meristem as ms

    def run(request, out):
        checked = session.check(request)
        materials = session.prepare(checked, out)
        config = out / "meristem.yaml"
        if not config.exists():
            config.write_text(
                "schema: meristem/workspace/v1\nevaluation: {dtype: float32, device: cpu, batch_tokens: 4096}\n"
            )
        begun = (out / ".meristem" / "meristem.db").exists()
        ws = (ms.Workspace.open if begun else ms.Workspace.create)(out, actor="kim")
        try:
            return list(session.execute(checked, materials, out, ws.store, ws.actor, ws.evaluator(), None))
        finally:
            ws.close()

    return run


@pytest.fixture(scope="session")
def done(request_for, run_bench, tmp_path_factory):
    """A folder with sequential, replay and per-task done, and what the run returned."""
    out = tmp_path_factory.mktemp("bench-out")
    request = request_for("tiny-2", "sequential", "experience-replay:ratio=0.5", "per-task")
    return out, request, run_bench(request, out)
