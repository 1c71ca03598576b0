"""Versions of kind ``experts``: made by updates, evaluated, released, taken back, checked out, sent, and refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests import acme
from tests.cli import process
from tests.training.lines import content, release, said

import meristem as ms
from meristem.cli.main import main
from meristem.config import Lora, MethodConfig, Recipe
from meristem.ecosystem.bundles.documents import _check_content
from meristem.ecosystem.folders import ingest
from meristem.ecosystem.records import Plan
from meristem.engine.load import load
from meristem.engine.prompts import encode_prompt
from meristem.errors import BadInput
from meristem.methods import build
from meristem.methods.architecture import experts as runtime
from meristem.training import updates
from meristem.training.continual import continual
from meristem.training.recipes import settled

METHOD = "param-isolation"


@pytest.fixture(scope="module")
def line(origin, tmp_path_factory):
    """Task a, then b, each an expert; both released: v3 is the champion."""
    folder = tmp_path_factory.mktemp("experts") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    release(ws, "ab", METHOD)
    ws.close()
    return folder


@pytest.fixture
def ws(line, copy):
    ws = ms.Workspace.open(copy(line), actor="kim")
    yield ws
    ws.close()


def test_released_and_taken_back_and_nothing_learned_before_is_forgotten(ws):
    matrix = ws.task_matrix("support").matrix
    assert ws.version("support").label == "support@v3" and matrix.acc > 0.9 and matrix.bwt > -0.1
    assert ws.version("support").record.tasks == ["a", "b"]
    ws.rollback("support")
    assert ws.version("support").label == "support@v2" and ws.verify().intact
    assert ms.Workspace.doctor(ws.root).problems == 0


def test_an_old_expert_is_stored_once(ws):
    """Its tensors are those of the version before, digest for digest, and of the method state beside it."""
    old, new = content(ws, "support@v2"), content(ws, "support@v3")
    assert (old.kind, new.kind, new.base) == ("experts", "experts", content(ws, "base").digest)
    assert old.tensors.items() < new.tensors.items() and "adapter_config.json" not in new.files
    assert len(new.tensors) == 2 * len(old.tensors)
    difference = ws.diff("support@v2", "support@v3")["tensors"]
    assert difference == {"added": len(old.tensors), "removed": 0, "changed": 0, "same": len(old.tensors)}
    state = ws.store.document(ws.version("support@v3").record.assets["method-state"])
    assert set(state["tensors"].values()) == set(new.tensors.values())


def test_each_expert_is_a_peft_adapter_in_a_checkout(ws, tmp_path):
    """The same greedy text in plain PEFT as inside, where the router gives the expert all the weight."""
    made = ws.checkout("support@v3", tmp_path / "out")
    assert made.experts == ("a", "b") and not (made.folder / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        AutoPeftModelForCausalLM.from_pretrained(made.folder, local_files_only=True)
    engine = load(made.folder, base_folder=made.base_folder, dtype="float32")
    attached = runtime.of(engine.model)
    for at, task in enumerate("ab"):
        questions = []
        for word in acme.WORDS:
            question = f"{task.upper()} {word} ?"
            with attached.fixed([encode_prompt(engine, question)]):
                if attached.routing.weights[0, at] == 1:
                    questions.append(question)
        assert len(questions) > 10
        alone = load(made.folder / task, base_folder=made.base_folder, dtype="float32")
        assert said(engine, questions) == said(alone, questions)
        model = AutoPeftModelForCausalLM.from_pretrained(made.folder / task).eval()
        ids = torch.tensor([encode_prompt(engine, questions[0])])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, engine.model(ids).logits, rtol=1e-5, atol=1e-5)
    with ingest(made.folder, content(ws, "base").digest) as (found, _):
        assert (found.kind, found.tensors) == ("experts", content(ws, "support@v3").tensors)


def test_a_new_process_learns_and_answers_as_this_one(ws, tmp_path):
    """Task c on v3, in a process of its own and again in this one: the same bits, the old experts among them."""
    ws.add_data("c", acme.lines(tmp_path / "c.jsonl", acme.training_rows("c")))
    ws.add_suite("c", acme.suite_file(tmp_path / "c.yaml", "c"))
    ws.close()
    done = process.run(ws.root, "update", "run", "support", "--data", "c", "--method", METHOD)
    assert done.code == 0, done.err
    again = ms.Workspace.open(ws.root, actor="kim")
    assert again.version("support@challenger").label == "support@v4"
    assert again.reproduce("update-3").equal
    assert content(again, "support@v3").tensors.items() < content(again, "support@v4").tensors.items()
    again.close()


def test_one_expert_can_be_asked_whatever_the_router_says(ws):
    """An evaluation of its own: the digest of the settings says whose it is."""
    routed, own, other = (ws.evaluate("support@v3", "a", expert=expert) for expert in (None, "a", "b"))
    assert own.record.summary["score"] >= routed.record.summary["score"] > other.record.summary["score"]
    assert len({entry.record.engine for entry in (routed, own, other)}) == 3
    assert "expert" not in routed.record.settings and own.record.settings["expert"] == "a"
    with pytest.raises(BadInput, match="no expert of task 'c': there are a, b"):
        ws.evaluate("support@v3", "a", expert="c")
    with pytest.raises(BadInput, match="no experts in this version"):
        ws.evaluate("base", "a", expert="a")


def test_after_a_regression_the_line_keeps_its_method(ws):
    """The default answer, replay and EWC, would train past the experts; what goes with them is added to them."""
    ws.signal("regression", "support", data=["a"])
    recipe = Recipe.from_document(ws.store.document(ws.plan("support").as_(Plan).recipe))
    assert [method.name for method in recipe.methods][:2] == [METHOD, "experience-replay"]
    continual(object, [build(method.name, method.arguments) for method in recipe.methods])


def test_it_goes_to_another_workspace(ws, tmp_path):
    ws.push("support@v3", tmp_path / "bundle")
    other = ms.Workspace.create(tmp_path / "other", actor="lee")
    other.pull(str(tmp_path / "bundle"))
    assert other.versions("support")[-1].content == ws.version("support@v3").content
    assert other.verify().intact
    other.close()


def test_experts_that_came_without_recipe_or_method_state_go_on(ws, tmp_path):
    """The shape of the next LoRA is that of the newest expert, and the old ones are in the version itself."""
    made = ws.commit("support", ws.checkout("support@v3", tmp_path / "out").folder)
    assert not made.record.assets and made.record.recipe is None
    asked = Recipe(methods=[MethodConfig(name=METHOD)], max_steps=1, dtype="float32", max_length=64)
    recipe = settled(ws.store, asked, made)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.layers) == (8, 16, 1.0)
    wider = settled(ws.store, asked.model_copy(update={"lora": Lora(rank=3)}), made)
    assert (wider.lora.rank, wider.lora.targets) == (3, recipe.lora.targets)
    data = [ws.add_data("c", acme.lines(tmp_path / "c.jsonl", acme.training_rows("c"))).digest]
    entry = updates.open_update(ws.store, "kim", parent=made, data=data, recipe=wider)
    new = updates.run(ws.store, "kim", entry)
    tensors = content(ws, new.label).tensors
    assert content(ws, "support@v3").tensors.items() < tensors.items()
    assert sum(name.startswith("experts.2.") for name in tensors) == 28


def test_the_command_line_says_what_lies_where(ws, tmp_path, capsys, monkeypatch):
    ws.close()
    for arguments, shown in (
        (
            ["model", "checkout", "support@v3", "--to", str(tmp_path / "out")],
            "experts, each a PEFT adapter in its",
        ),
        (
            ["model", "checkout", "support@v3", "--to", str(tmp_path / "two"), "--json"],
            '"experts": [ "a", "b" ]',
        ),
        (["model", "show", "support@v3", "--json"], "support@v3"),
        (["model", "diff", "support@v2", "support@v3"], "tensors"),
    ):
        monkeypatch.setattr(sys, "argv", ["meristem", "--workspace", str(ws.root), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code in (0, None)
        assert shown in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (
            [],
            "set of experts made by param-isolation, and no method would train past them: update it with --method",
        ),
        (["ewc"], "method ewc would train past them"),
        (["o-lora"], "method o-lora would train past them"),
        (["mocl"], "method mocl would train past them"),
        (["o-lora", METHOD], "o-lora and param-isolation both replace the architecture"),
    ],
)
def test_other_updates_of_experts_are_refused_before_training(ws, methods, says):
    with pytest.raises(ms.errors.MeristemError, match=says):
        ws.update("support", data=["a"], methods=methods)
    assert len(ws.records("update")) == len(ws.records("plan")) == 2
    assert len(ws.versions("support")) == 3


def test_a_task_learned_twice_and_an_adapter_below_are_refused(ws, released, copy):
    with pytest.raises(BadInput, match="an expert of task 'a' already"):
        ws.update("support", data=["a"], methods=[METHOD])
    other = ms.Workspace.open(copy(released, "other"))
    with pytest.raises(
        BadInput, match=r"param-isolation keeps an expert per task, and support@v2 is one adapter"
    ):
        other.update("support", data=["b"], methods=[METHOD])
    assert len(other.records("update")) == 1
    other.close()


def test_folders_and_bundles_that_are_not_what_they_say_are_refused(ws, tmp_path):
    made = ws.checkout("support@v3", tmp_path / "out")
    place = made.folder / "experts.json"
    right, base = json.loads(place.read_bytes()), content(ws, "base").digest
    for change, says in (
        ({"schema": "meristem/experts/v9"}, "schema"),
        ({"extra": 1}, "extra"),
        ({"experts": right["experts"][:1]}, "tensor experts.1."),
        ({"experts": [right["experts"][0]] * 2}, "two experts of task 'a'"),
    ):
        place.write_text(json.dumps({**right, **change}))
        with pytest.raises(BadInput, match=f"experts.json: {says}"), ingest(made.folder, base):
            pass
        with pytest.raises(BadInput, match=f"experts.json: {says}"):
            load(made.folder, base_folder=made.base_folder)
    place.write_text(json.dumps(right))
    with pytest.raises(BadInput, match="name the model below with --base"), ingest(made.folder):
        pass
    with pytest.raises(BadInput, match="needs base_folder"):
        load(made.folder)
    found = content(ws, "support@v3")
    _check_content(found)
    for odd in ("adapter_config.json",):
        with pytest.raises(BadInput, match="not those of a content of kind experts"):
            _check_content(found.model_copy(update={"files": {**found.files, odd: base}}))
    for kind, config in (("full", "config.json"), ("adapter", "adapter_config.json")):
        other = {"kind": kind, "base": None if kind == "full" else base}
        with pytest.raises(BadInput, match=f"not those of a content of kind {kind}"):
            _check_content(found.model_copy(update={**other, "files": {**found.files, config: base}}))
    assert set(load_file(made.folder / "experts.safetensors")) == set(found.tensors)
