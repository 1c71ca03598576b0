"""The whole story from Python, as a notebook user would tell it, and what ``Workspace`` promises beside it."""

from __future__ import annotations

import socket

import pytest
from tests import acme

import meristem as ms
from meristem.config import TEMPLATE
from meristem.errors import BadInput, EnvironmentFailure, GateFailed, StateMoved, Tampered


@pytest.fixture
def ws(fresh):
    ws = ms.Workspace.open(fresh, actor="kim")
    yield ws
    ws.close()


def digests(ws, reference):
    """Every tensor and file of a version, its base's included, by digest."""
    from meristem.ecosystem import versions

    found, digest = {}, ws.version(reference).content
    with ws.store.database.read() as connection:
        while digest:
            content = versions.content_of(connection, digest)
            found[digest] = (content.tensors, content.files)
            digest = content.base
    return found


def greedy(folder, base_folder):
    """What a checkout says, loaded as the engine does."""
    from meristem.engine.generate import generate
    from meristem.engine.load import load
    from meristem.engine.prompts import encode_prompt

    engine = load(folder, base_folder=base_folder, dtype="float32")
    asked = [f"{task} {word} ?" for task in "AB" for word in acme.WORDS[:3]]
    return generate(engine, [encode_prompt(engine, text) for text in asked], max_new_tokens=8)


def test_the_whole_story(tmp_path, monkeypatch):
    """Create, learn, release, a forgetful update blocked, the loop's answer released, taken back bit for bit."""
    folder = acme.company(tmp_path)
    files = tmp_path / "files"
    ws = ms.Workspace.create(folder, actor="kim")
    foundation = ws.add_model("base", tier="foundation", source=str(files / "model"))
    start = ws.add_model("support", tier="industrial", base="base")
    assert start.record.base == foundation.digest and start.content == foundation.content
    for task in "ab":
        ws.add_suite(task, files / f"{task}.yaml")
        assert ws.add_data(task, files / f"{task}.jsonl").record.facts["rows"] == 16

    # Task a: update, propose, explain, promote.
    update = ws.update("support", data=["a"])
    assert update.version.label == "support@v2" and update.outcome.steps == 30
    assert ws.version("support@challenger") == update.version
    assert ws.version("support@champion") == start  # nothing moves without a decision
    report = ws.compare(update.version, "support@champion", suite="a")
    assert report.difference > 0 and report.mcnemar_p < 0.01
    decision = ws.propose(update.version)
    assert decision.passed and [g.gate for g in ws.explain(decision.id).gates] == ["improvement"]
    ws.promote(decision, reason="first release")
    v2 = ws.version("support@champion")
    assert v2 == update.version

    # Task b, plainly: learned, and a forgotten. The gate blocks it and the flipped items are there to read.
    ws.signal("new-data", "support", data=["b"], note="second task")
    turn = ws.turn("support")
    assert turn.outcome == "stopped" and turn.decision.status == "fail"
    flipped = ws.compare(turn.version, v2, suite="a").flipped
    assert len(flipped) > 20
    with pytest.raises(GateFailed, match=f"{turn.decision.id} failed"):
        ws.promote(turn.decision.id)
    assert ws.version("support") == v2
    signal = turn.next_signal
    assert signal.id == "signal-2" and signal.record.kind == "regression"
    assert signal.record.cause == turn.decision.digest

    # The loop's own answer: replay and EWC, which pass.
    turn = ws.turn("support")
    assert turn.outcome == "released" and ws.turn("support") is None
    v4 = ws.version("support@champion")
    assert v4.record.parents == [v2.digest] and v4.record.tasks == ["a", "b"]
    matrix = ws.task_matrix("support")
    assert matrix.versions == ("support@v2", "support@v4") and matrix.matrix.acc > 0.9
    assert matrix.matrix.bwt > -0.1

    # Rollback gives the bits that were served before, with no network.
    before, said = digests(ws, v2), greedy(*_paths(ws.checkout(v2, tmp_path / "before")))
    ws.close()

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ws = ms.Workspace.open(folder, actor="lee")
    release = ws.rollback("support", reason="customers complain")
    assert release.record.kind == "rollback" and ws.version("support") == v2
    assert digests(ws, "support@champion") == before
    assert greedy(*_paths(ws.checkout("support", tmp_path / "after"))) == said
    assert (tmp_path / "after/adapter_model.safetensors").read_bytes() == (
        tmp_path / "before/adapter_model.safetensors"
    ).read_bytes()

    assert [e.record.kind for e in ws.history("support")] == ["promote", "promote", "rollback"]
    moves = [e for e in ws.events() if e.kind == "alias.moved" and e.data["alias"] == "champion"]
    assert [(e.actor, e.reason) for e in moves][-1] == ("lee", "customers complain")
    audit = ws.verify(head=moves[0].hash)
    assert audit.intact and audit.blobs > 10
    ws.close()


def _paths(made):
    return made.folder, made.base_folder


def test_create_refuses_a_second_workspace_and_a_file(fresh, tmp_path):
    with pytest.raises(BadInput, match="there is a workspace already"):
        ms.Workspace.create(fresh)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="this is a file"):
        ms.Workspace.create(tmp_path / "file")


def test_create_never_throws_a_store_away(fresh):
    """A workspace that lost its meristem.yaml gets a new one; its history is still there."""
    before = acme.state(fresh)
    (fresh / "meristem.yaml").unlink()
    ws = ms.Workspace.create(fresh)
    assert (fresh / "meristem.yaml").read_text() == TEMPLATE
    assert [m.name for m in ws.models()] == ["base", "support"]
    ws.close()
    after = acme.state(fresh)
    assert {k: v for k, v in before.items() if k != "meristem.yaml"} == {
        k: v for k, v in after.items() if k != "meristem.yaml"
    }


def test_create_finishes_what_was_cut_off(tmp_path):
    """Cut off before the tables were there: the same call makes the workspace."""
    (tmp_path / ".meristem").mkdir()
    (tmp_path / ".meristem/meristem.db").touch()
    ws = ms.Workspace.create(tmp_path)
    assert ws.models() == [] and ws.verify().intact
    ws.close()


def test_a_bad_configuration_leaves_no_workspace_behind(tmp_path):
    (tmp_path / "meristem.yaml").write_text("schema: meristem/workspace/v1\nnonsense: 1\n")
    with pytest.raises(BadInput, match=r"meristem.yaml: nonsense"):
        ms.Workspace.create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["meristem.yaml"]


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match="meristem init"):
        ms.Workspace.open(tmp_path)
    (tmp_path / "meristem.yaml").write_text(acme.CONFIG)
    with pytest.raises(EnvironmentFailure, match="restore it"):
        ms.Workspace.open(tmp_path)


def test_the_actor_is_named_even_without_a_login_name(fresh, monkeypatch):
    def nobody():
        raise KeyError("uid not found")

    monkeypatch.delenv("MERISTEM_ACTOR", raising=False)
    monkeypatch.setattr("getpass.getuser", nobody)
    ws = ms.Workspace.open(fresh)
    assert ws.actor.startswith("uid-")
    ws.close()


def test_the_same_update_again_is_the_same_update(grown):
    """Nothing is trained twice: the same data, recipe and champion name the update that is done."""
    ws = ms.Workspace.open(grown, actor="kim")
    before = acme.state(grown)
    again = ws.update("support", data=["b", "b"], methods=acme.REPLAY_AND_EWC)  # a repeated name counts once
    assert again.id == "update-3" and again.version.label == "support@v4"
    assert ws.update_result("update-3").outcome == again.outcome
    ws.close()
    assert {k: v for k, v in acme.state(grown).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }
    assert not (grown / ".meristem/runs/update-3").exists()


def test_an_update_needs_data_and_has_a_version_only_when_done(ws):
    with pytest.raises(BadInput, match="at least one data set"):
        ws.update("support", data=[])
    ws.signal("new-data", "support", data=["a"])
    plan = ws.plan("support")
    from meristem.config import Recipe
    from meristem.training import updates

    recipe = Recipe.from_document(ws.store.document(plan.record.recipe))
    entry = updates.open_update(
        ws.store, "kim", parent=ws.version("support"), data=plan.record.data, recipe=recipe
    )
    with pytest.raises(BadInput, match="update-1 is open and has no version yet"):
        _ = ws.update_result(entry.id).version


def test_the_wrong_kind_of_record_is_bad_input(grown):
    ws = ms.Workspace.open(grown)
    for call in (ws.explain, ws.promote, ws.approve):
        with pytest.raises(BadInput, match="update-1 is no decision"):
            call("update-1")
    with pytest.raises(BadInput, match="decision-1 is no update"):
        ws.resume("decision-1")
    ws.close()


def test_judge_tries_out_a_policy_and_records_nothing(grown):
    ws = ms.Workspace.open(grown)
    ws.compare("support@v4", "support@v2", suite="a")
    before = acme.state(grown)
    strict = ws.judge("support@v4", "support@v2", suite="a", gate="non_inferiority", margin=0.0)
    assert strict.outcome == "inconclusive"
    assert (
        ws.judge("support@v4", "support@v2", suite="a", gate="non_inferiority", margin=0.5).outcome == "pass"
    )
    ws.close()
    assert acme.state(grown) == before


def test_the_champion_moves_only_once_for_two_decisions(grown):
    """Two decisions against v2; after the first is released, the second is void and says where the champion is."""
    acme.gates(grown, "{gate: improvement, suites: new}")
    ws = ms.Workspace.open(grown)
    other = ws.update("support", data=["b"], recipe={"seed": 5})
    second = ws.propose(other.version)
    assert second.passed
    ws.promote("decision-3")
    with pytest.raises(StateMoved, match="the champion moved from v2 to v4"):
        ws.promote(second)
    assert ws.version("support").label == "support@v4"
    ws.close()


def test_promotion_and_rollback_check_the_bytes_first(grown):
    """A flipped byte in a pack stops both: the pointer does not move to damaged weights."""
    ws = ms.Workspace.open(grown)
    adapter, _files = next(iter(digests(ws, "support@v4").values()))
    location = ws.store.location(next(iter(adapter.values())))
    path = ws.store.packs.path(location.pack)
    body = bytearray(path.read_bytes())
    body[location.offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(body)
    with pytest.raises(Tampered, match="missing or altered"):
        ws.promote("decision-3")
    assert ws.version("support").label == "support@v2" and len(ws.history("support")) == 1
    ws.close()
