"""Versions of MoE-CL: shared tensors, every task one plain adapter, killed and resumed in the third task, refused."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tests import acme
from tests.cli import process
from tests.training.lines import content, release, said

import meristem as ms
from meristem.config import MethodConfig, Recipe
from meristem.engine.load import load
from meristem.engine.prompts import encode_prompt
from meristem.errors import BadInput
from meristem.methods.architecture import experts as runtime
from meristem.methods.architecture.moe_cl import MoECL
from meristem.training import updates
from meristem.training.recipes import settled

METHOD = MoECL.name
THIRD = ("update", "run", "support", "--data", "c", "--method", METHOD)
MIDDLE = process.Moment("meristem.training.reporting:ProgressCallback.on_step_end", signal.SIGKILL, nth=7)


@pytest.fixture(scope="module")
def line(origin, tmp_path_factory):
    """Task a, then b, released: v3 is the champion. The data of task c lie ready."""
    folder = tmp_path_factory.mktemp("mixtures") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    release(ws, "ab", METHOD)
    ws.add_data("c", origin.parent / "files/c.jsonl")
    ws.add_suite("c", origin.parent / "files/c.yaml")
    ws.close()
    config = folder / "meristem.yaml"
    brief = config.read_text().replace("max_steps: 30", "max_steps: 12")
    config.write_text(brief.replace("checkpoint_steps: 10", "checkpoint_steps: 4"))
    return folder


@pytest.fixture
def ws(line, copy):
    ws = ms.Workspace.open(copy(line), actor="kim")
    yield ws
    ws.close()


def test_a_new_version_shares_all_that_was_learned_but_the_shared_b(ws):
    old, new = (content(ws, f"support@v{n}").tensors for n in (2, 3))
    assert old.keys() < new.keys()
    moved = [name for name in old if old[name] != new[name]]
    assert moved and all(name.startswith("shared.") and "lora_B" in name for name in moved)
    assert len(moved) == sum(name.startswith("shared.") for name in old) / 2
    assert {name.split(".")[1] for name in new.keys() - old.keys()} == {"1"}
    matrix = ws.task_matrix("support").matrix
    assert matrix.acc > 0.8 and matrix.bwt > -0.05 and ws.verify().intact


def test_each_task_is_one_plain_adapter_of_twice_the_rank(ws, tmp_path):
    """Greedy text and logits in plain PEFT are ours, wherever the router picks that task."""
    made = ws.checkout("support@v3", tmp_path / "out")
    assert made.experts == ("a", "b") and not (made.folder / "adapter_config.json").exists()
    engine = load(made.folder, base_folder=made.base_folder, dtype="float32")
    attached, answers = runtime.of(engine.model), []
    for at, task in enumerate("ab"):
        questions = []
        for word in acme.WORDS:
            question = f"{task.upper()} {word} ?"
            with attached.fixed([encode_prompt(engine, question)]):
                if attached.routing.weights[0, at] == 1:
                    questions.append(question)
        assert len(questions) > 10
        model = AutoPeftModelForCausalLM.from_pretrained(made.folder / task).eval()
        assert model.peft_config["default"].r == 2 * attached.frozen[at].about.rank
        ours, first = said(engine, questions), encode_prompt(engine, questions[0])
        alone = load(made.folder / task, base_folder=made.base_folder, dtype="float32")
        assert said(alone, questions) == ours
        greedy = model.generate(torch.tensor([first]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert engine.tokenizer.decode(greedy[0, len(first) :], skip_special_tokens=True) == ours[0]
        with torch.no_grad():
            ids = torch.tensor([first])
            torch.testing.assert_close(model(ids).logits, engine.model(ids).logits, rtol=1e-5, atol=1e-5)
        answers.append(ours[0])
    assert answers[0] != answers[1]


def test_killed_in_the_middle_of_the_third_task_it_ends_as_if_it_had_not_been(ws, line, copy):
    """In new processes, from the stored state of task b: the same bits as an update here, which is reproduced too."""
    ws.close()
    killed = process.run(ws.root, *THIRD, at=MIDDLE)
    assert killed.code == -signal.SIGKILL
    assert list((ws.root / ".meristem/runs").glob("update-3/*"))
    done = process.run(ws.root, *THIRD)
    assert done.code == 0, done.err
    whole = ms.Workspace.open(copy(line, "whole"), actor="kim")
    label = whole.update("support", data=["c"], methods=[METHOD]).version
    resumed = ms.Workspace.open(ws.root, actor="kim")
    ours, theirs = content(resumed, "support@v4"), content(whole, label)
    assert ours.tensors == theirs.tensors and len(ours.tensors) > len(content(whole, "support@v3").tensors)
    states = [w.version("support@v4").record.assets["method-state"] for w in (resumed, whole)]
    assert states[0] == states[1]
    assert resumed.reproduce("update-3").equal and resumed.verify().intact
    resumed.close()
    whole.close()


def test_a_task_learned_twice_and_a_line_of_another_method_are_refused_before_training(ws):
    known = len(ws.records("update"))
    for data, methods, says in (
        (["a"], [METHOD], "an expert of task 'a' already .* give the new rows another task name"),
        (["c"], ["mocl"], "method mocl would train past them"),
        (["c"], [f"{METHOD}:gate=token"], r"gate='token' does not go with .* static gates: give gate=static"),
        (["c"], [f"{METHOD}:depth=1"], "the prototypes of a, b were made at depth 2: give depth=2"),
    ):
        with pytest.raises(ms.errors.MeristemError, match=says) as found:
            ws.update("support", data=data, methods=methods)
        assert "\n" not in str(found.value)
    assert len(ws.versions("support")) == 3
    assert all(entry.status != "done" for entry in ws.records("update")[known:])


def test_experts_without_their_method_state_are_refused_with_the_remedy(ws, files, tmp_path):
    """What a folder holds is enough to answer, and not to keep the shared expert from forgetting."""
    made = ws.commit("support", ws.checkout("support@v3", tmp_path / "out").folder)
    assert not made.record.assets and content(ws, made.label).tensors == content(ws, "support@v3").tensors
    asked = Recipe(methods=[MethodConfig(name=METHOD)], max_steps=1, dtype="float32", max_length=64)
    given = {
        "parent": made,
        "data": [ws.add_data("c", files / "c.jsonl").digest],
        "recipe": settled(ws.store, asked, made),
    }
    entry = updates.open_update(ws.store, "kim", **given)
    with pytest.raises(BadInput, match=r"no statistics of task 'a' .*: give the method_state of the update"):
        updates.run(ws.store, "kim", entry)
