"""Versions of FFN-level experts: made by updates on one another, answered by our engine, and honest in a checkout."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import AutoPeftModelForCausalLM
from tests import acme

import meristem as ms
from meristem.cli.main import main
from meristem.ecosystem import versions
from meristem.engine.generate import generate
from meristem.engine.load import load
from meristem.engine.prompts import encode_prompt
from meristem.methods.architecture.experts import of
from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts

METHOD = "moe-cl:preset=published,depth=1"
LORA = {"rank": 4, "alpha": 8, "targets": ["gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def line(origin, tmp_path_factory):
    """Task a, then b, each an expert beside the shared one: v2 and v3."""
    folder = tmp_path_factory.mktemp("ffn") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    for task in "ab":
        decision = ws.propose(ws.update("support", data=[task], methods=[METHOD], recipe={"lora": LORA}).version)
        assert decision.passed, decision
        ws.promote(decision)
    ws.close()
    return folder


@pytest.fixture
def ws(line, copy):
    ws = ms.Workspace.open(copy(line), actor="kim")
    yield ws
    ws.close()


def content(ws, reference):
    with ws.store.database.read() as connection:
        return versions.content_of(connection, ws.version(reference).content)


def test_both_tasks_are_known_after_the_second(ws):
    matrix = ws.task_matrix("support").matrix
    assert ws.version("support").label == "support@v3" and matrix.acc > 0.9 and matrix.bwt > -0.1


def test_an_old_expert_is_stored_once_and_the_rest_moves_on(ws):
    old, new = (content(ws, f"support@v{n}").tensors for n in (2, 3))
    moved = {name.split(".")[0] for name in old if old[name] != new[name]}
    assert moved == {"shared", "gates"} and old.keys() < new.keys()
    added = {name.split(".")[:2][-1] for name in new.keys() - old.keys()}
    assert added == {"1"}  # experts.1, vectors.1, residuals.1


def test_a_checkout_is_served_by_meristem_and_says_that_no_adapter_is_equal(ws, tmp_path, capsys, monkeypatch):
    made = ws.checkout("support@v3", tmp_path / "out")
    assert made.experts == () and "no PEFT adapter is equal to" in made.meristem_alone
    assert json.loads((made.folder / "meristem.json").read_text())["peft"] == made.meristem_alone
    assert not list(made.folder.rglob("adapter_config.json"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        AutoPeftModelForCausalLM.from_pretrained(made.folder, local_files_only=True)
    engine = load(made.folder, base_folder=made.base_folder, dtype="float32")
    assert isinstance(of(engine.model), FfnExperts)
    questions = {f"{task.upper()} {word} ?": acme.ANSWERS[task] for task in "ab" for word in acme.WORDS[:6]}
    prompts = [encode_prompt(engine, question) for question in questions]  # of both tasks in one batch
    assert [t.text for [t] in generate(engine, prompts, max_new_tokens=1)] == list(questions.values())
    ws.close()
    monkeypatch.chdir(ws.root)
    assert main(["model", "checkout", "support@v3", "--to", str(tmp_path / "two")]) in (0, None)
    assert "no PEFT adapter is equal to" in " ".join(capsys.readouterr().out.split())


def test_it_goes_on_in_another_process_as_in_this(ws, tmp_path):
    ws.add_data("c", acme.lines(tmp_path / "c.jsonl", acme.training_rows("c")))
    ws.add_suite("c", acme.suite_file(tmp_path / "c.yaml", "c"))
    made = ws.update("support", data=["c"], methods=[METHOD], recipe={"lora": LORA}).version
    assert content(ws, made.label).tensors.keys() > content(ws, "support@v3").tensors.keys()
    assert ws.reproduce("update-3").equal
