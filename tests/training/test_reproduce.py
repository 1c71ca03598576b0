"""``update reproduce``: bit-equal, or the first difference by name; nothing else changes and nothing is left."""

from __future__ import annotations

import signal
import struct

import pytest
from sqlalchemy import update
from tests import acme
from tests.cli.process import Moment, run

import meristem as ms
from meristem.ecosystem import retirement
from meristem.errors import BadInput, Interrupted
from meristem.store import index
from meristem.store.schema import records
from meristem.training import reproduce, updates

SHORT = {"max_steps": 3}


@pytest.fixture
def ws(released, copy):
    made = ms.Workspace.open(copy(released), actor="kim")
    yield made
    made.close()


def untouched(ws):
    """What a reproduction must leave as it is."""
    return [
        [alias for model in ws.models() for alias in ws.aliases(model.name)],
        [version.digest for version in ws.versions("support")],
        [(entry.id, entry.status) for entry in ws.records("update")],
        sorted(path.name for path in (ws.root / ".meristem/runs").glob("*")),
    ]


def test_an_update_with_replay_and_ewc_is_bit_equal(ws):
    made = ws.update("support", data=["b"], methods=acme.REPLAY_AND_EWC, recipe=SHORT)
    before = untouched(ws)
    for reference in (made.id, made.version.label, "support@challenger"):
        found = ws.reproduce(reference)
        assert (found.equal, found.difference) == (True, None)
        assert (found.update, found.version) == (made.entry.digest, made.version.digest)
    told = list(ws.events())[-1]
    assert (told.kind, told.actor, told.subject) == ("reproduction.recorded", "kim", found.digest)
    assert told.data == {"equal": True, "first": None}
    assert untouched(ws) == before and ws.verify().intact


def recorded_as(ws, made, version):
    """Let the record of update ``made`` say that it produced ``version``."""
    outcome = made.outcome.model_copy(update={"version": version.digest})
    with ws.store.transaction("mallory") as tx:
        digest = tx.add_document(outcome.document())
        where = (records.c.kind == "update") & (records.c.number == made.entry.number)
        tx.connection.execute(update(records).where(where).values(result=digest))


def test_another_seed_is_found_and_the_first_difference_named(ws):
    made, other = (ws.update("support", data=["b"], recipe={**SHORT, "seed": seed}) for seed in (0, 1))
    recorded_as(ws, made, other.version)
    found = ws.reproduce(made.id)
    assert not found.equal and found.difference["why"] == "elements differ"
    name = found.difference["name"]
    with ws.store.database.read() as connection:
        here, recorded = (updates.versions.content_of(connection, m.version.content) for m in (made, other))
    assert name == min(n for n in here.tensors if here.tensors[n] != recorded.tensors[n])
    old, new = (ws.store.read_blob(content.tensors[name]) for content in (recorded, here))
    pairs = list(zip(struct.iter_unpack("<f", old), struct.iter_unpack("<f", new), strict=True))
    assert found.difference["differing"] == sum(a != b for a, b in pairs)
    first = next(pair for pair in pairs if pair[0] != pair[1])
    assert [found.difference["recorded"], found.difference["here"]] == [repr(value) for (value,) in first]
    told = list(ws.events())[-1]
    assert told.data == {"equal": False, "first": name} and ws.store.document(told.subject)["difference"]
    assert f"weights {name}: elements differ" in reproduce.in_words(found.difference)


def test_a_tensor_that_was_not_made(ws):
    """Recorded with the full weights that the model began with: no name of them is an adapter's."""
    made = ws.update("support", data=["b"], recipe=SHORT)
    recorded_as(ws, made, ws.version("support@v1"))
    difference = ws.reproduce(made.id).difference
    assert difference["why"] == "the tensor was made here, and is not recorded"


def test_recorded_bytes_that_were_given_up(ws):
    """Its documents still say whether it is the same."""
    made, other = (ws.update("support", data=["b"], recipe={**SHORT, "seed": seed}) for seed in (0, 1))
    recorded_as(ws, made, other.version)
    with ws.store.database.read() as connection:
        content = updates.versions.content_of(connection, other.version.content)
    with ws.store.database.write() as connection:
        index.forget(connection, content.tensors.values())
    assert "were given up" in ws.reproduce(made.id).difference["why"]


def test_the_state_of_a_method_is_compared_too(ws, monkeypatch):
    made = ws.update("support", data=["b"], methods=["ewc:strength=1,samples=8"], recipe=SHORT)
    honest = updates.train

    def other_state(*arguments):
        trained = honest(*arguments)
        tensors = trained.states["ewc"]["tensors"]
        name = sorted(tensors)[-1]
        tensors[name].view(-1)[-1] += 1
        return trained

    monkeypatch.setattr(updates, "train", other_state)
    difference = ws.reproduce(made.id).difference
    assert difference["part"] == "method state" and difference["name"].startswith("ewc/")
    assert difference["differing"] == 1


def test_stopped_by_ctrl_c(ws, monkeypatch):
    from meristem.training.reporting import ProgressCallback

    made = ws.update("support", data=["b"], recipe=SHORT)
    before, events = untouched(ws), len(list(ws.events()))
    original = ProgressCallback.on_step_end

    def asked(self, args, state, control, **kwargs):
        self._interruption.requested |= state.global_step == 2
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressCallback, "on_step_end", asked)
    with pytest.raises(Interrupted, match="nothing of it is kept"):
        ws.reproduce(made.id)
    assert untouched(ws) == before and len(list(ws.events())) == events


@pytest.mark.parametrize("twice", [False, True])
def test_a_process_that_gets_ctrl_c(released, copy, twice):
    folder = copy(released)
    moment = "meristem.training.reporting:ProgressCallback.on_step_end"
    if twice:  # outside the training: at once
        moment = "meristem.training.reproduce:_compare"
    done = run(folder, "update", "reproduce", "update-1", at=Moment(moment, signal.SIGINT, 1))
    assert done.code == 130 and len(done.err.strip().splitlines()) <= 2, done
    assert [path.name for path in (folder / ".meristem/runs").glob("reproduce-*")] == []


def refused(ws, reference, told):
    before = untouched(ws)
    with pytest.raises(BadInput, match=told):
        ws.reproduce(reference)
    assert untouched(ws) == before


def test_what_is_refused_before_any_compute(ws, monkeypatch):
    made = ws.update("support", data=["b"], recipe=SHORT)

    def trained(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(updates, "train", trained)
    refused(ws, "base@v1", "was not made by an update")
    refused(ws, "update-9", "there is no update-9")
    refused(ws, "decision-1", "unknown model")
    here = updates.code_versions()
    with monkeypatch.context() as patched:
        patched.setattr(updates, "code_versions", lambda: {**here, "torch": "99.1"})
        refused(ws, made.id, r"update-2 was made with torch .* \(now 99\.1\): install that again")
    with pytest.raises(AssertionError):
        ws.update("support", data=["b"], recipe={**SHORT, "seed": 7})
    refused(ws, "update-3", "update-3 is failed and has made no version")
    for noun, digest, label in (
        ("asset", ws.asset("dataset", "a").digest, "a@v1"),  # for replay
        ("asset", ws.asset("dataset", "b").digest, "b@v1"),
        ("asset", ws.version("support@v2").record.assets["method-state"], "support@v1"),
        ("version", ws.version("support@v2").digest, "support@v2"),
    ):
        with ws.store.transaction("ops") as tx:
            gone = retirement.give_up(tx, noun, digest, "retired", "too old", label=label, kind="some")
        refused(ws, made.id, f"update-2 cannot be reproduced: {label} was retired by event {gone.sequence}")
        with ws.store.transaction("ops") as tx:
            retirement.restore(tx, noun, digest)


def test_the_command(ws):
    made = ws.update("support", data=["b"], recipe=SHORT)
    done = run(ws.root, "update", "reproduce", "update-2")
    assert (done.code, done.out) == (0, "update-2: bit-equal to support@v3\n"), done
    recorded_as(ws, made, ws.version("support@v2"))
    done = run(ws.root, "update", "reproduce", "update-2")
    assert done.code == 1 and done.out.startswith("update-2 differs from support@v2: weights "), done


@pytest.mark.parametrize(
    ("dtype", "shape", "old", "new", "index", "recorded", "here", "differing"),
    [
        (
            "F32",
            (2, 2),
            struct.pack("<4f", 1, 2, 3, 4),
            struct.pack("<4f", 1, 2, 5, 6),
            [1, 0],
            "3.0",
            "5.0",
            2,
        ),
        ("F32", (), struct.pack("<f", 0.0), struct.pack("<f", -0.0), [0], "0.0", "-0.0", 1),
        ("BF16", (2,), b"\x80\x3f\x80\x3f", b"\x80\x3f\x00\x40", [1], "1.0", "2.0", 1),
        ("F16", (1,), b"\x00\x3c", b"\x00\x7e", [0], "1.0", "nan (0x7e00)", 1),
        ("I64", (1,), struct.pack("<q", -1), struct.pack("<q", 7), [0], "-1", "7", 1),
        ("BOOL", (2,), b"\x00\x01", b"\x00\x00", [1], "True", "False", 1),
        ("F8_E4M3", (1,), b"\x01", b"\x0f", [0], "0x01", "0x0f", 1),
    ],
)
def test_the_first_element(dtype, shape, old, new, index, recorded, here, differing):
    found = reproduce.first_element(dtype, shape, old, new)
    assert [found[key] for key in ("index", "recorded", "here", "differing")] == [
        index, recorded, here, differing,
    ]  # fmt: skip
