"""Versions of FFN-level experts: made by updates on one another, answered by our engine, and honest in a checkout."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from peft import AutoPeftModelForCausalLM
from tests import acme
from tests.training.lines import content

import meristem as ms
from meristem.cli.main import main
from meristem.engine.generate import generate
from meristem.engine.load import load
from meristem.engine.prompts import encode_prompt
from meristem.methods.architecture.experts import of
from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts

METHOD = "moe-cl:preset=published,depth=1"
RECIPE = {
    "learning_rate": 0.003,
    "lora": {"rank": 4, "alpha": 8, "targets": ["gate_proj", "up_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def line(origin, tmp_path_factory):
    """Task a, then b, each an expert beside the shared one: v2 and v3. The published preset protects nothing, and the
    gates see that a is forgotten: v3 is no champion."""
    folder = tmp_path_factory.mktemp("ffn") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    ws.promote(ws.propose(ws.update("support", data=["a"], methods=[METHOD], recipe=RECIPE).version))
    ws.update("support", data=["b"], methods=[METHOD], recipe=RECIPE)
    ws.close()
    return folder


@pytest.fixture
def ws(line, copy):
    ws = ms.Workspace.open(copy(line), actor="kim")
    yield ws
    ws.close()


def test_an_old_expert_is_stored_once_and_the_rest_moves_on(ws):
    old, new = (content(ws, f"support@v{n}").tensors for n in (2, 3))
    moved = {name.split(".")[0] for name in old if old[name] != new[name]}
    assert moved == {"shared", "gates"} and old.keys() < new.keys()
    added = {name.split(".")[:2][-1] for name in new.keys() - old.keys()}
    assert added == {"1"}  # experts.1, vectors.1, residuals.1


def test_a_checkout_is_served_by_meristem_and_says_that_no_adapter_is_equal(
    ws, tmp_path, capsys, monkeypatch
):
    made = ws.checkout("support@v3", tmp_path / "out")
    assert made.experts == () and "no PEFT adapter is equal to" in made.meristem_alone
    assert json.loads((made.folder / "meristem.json").read_text())["peft"] == made.meristem_alone
    assert not list(made.folder.rglob("adapter_config.json"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        AutoPeftModelForCausalLM.from_pretrained(made.folder, local_files_only=True)
    engine = load(made.folder, base_folder=made.base_folder, dtype="float32")
    assert isinstance(of(engine.model), FfnExperts)
    questions = [f"{task} {word} ?" for word in acme.WORDS[:4] for task in ("A", "B", "whatever")]
    prompts = [encode_prompt(engine, question) for question in questions]
    together = generate(engine, prompts, max_new_tokens=4)
    assert together == [generate(engine, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    with of(engine.model).fixed(prompts):
        assert of(engine.model).routing.weights[:3].tolist() == [[1, 0], [0, 1], [0, 0]]
    ws.close()
    arguments = ["model", "checkout", "support@v3", "--to", str(tmp_path / "two")]
    monkeypatch.setattr(sys, "argv", ["meristem", "--workspace", str(ws.root), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)
    assert "no PEFT adapter is equal to" in " ".join(capsys.readouterr().out.split())


def test_an_update_of_a_released_one_is_done_again_to_the_bit(ws):
    """From the version, its method state and the new rows alone."""
    assert ws.version("support@v3").record.tasks == ["a", "b"]
    assert ws.reproduce("update-2").equal
