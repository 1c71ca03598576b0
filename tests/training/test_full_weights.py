"""Updates of all weights: what is stored loads again bit-equal, and every promise of an update holds for them."""

from __future__ import annotations

import json
import math
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import acme
from tests.cli.process import Moment, run
from tests.tiny import three_tasks, tiny_model
from transformers import AutoModelForCausalLM

import meristem as ms
from meristem.config import MethodConfig, Recipe, resolve_recipe
from meristem.ecosystem import versions
from meristem.errors import BadInput, Clash, NonFiniteLoss, TrainingFailed
from meristem.methods.registry import available, load
from meristem.training import ca, cit, cpt
from meristem.training.adapters import trainable_model
from meristem.training.continual import ContinualTrainer
from meristem.training.saving import save_full

FULL = {"weights": "full", "learning_rate": 0.003}


def content(ws, reference):
    with ws.store.database.read() as connection:
        return versions.content_of(connection, ws.version(reference).content)


@pytest.fixture(scope="module")
def learned(origin, tmp_path_factory):
    """Task a learned in all weights and released (``support@v2``), then b with replay (``support@v3``)."""
    folder = tmp_path_factory.mktemp("learned") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    ws.promote(ws.propose(ws.update("support", data=["a"], recipe=FULL).version))
    ws.update("support", data=["b"], methods=acme.REPLAY_AND_EWC, recipe=FULL)
    ws.close()
    return folder


@pytest.fixture
def ws(learned, copy):
    opened = ms.Workspace.open(copy(learned))
    yield opened
    opened.close()


def test_a_version_is_full_weights_with_its_parents_files(ws):
    first, second = content(ws, "support@v1"), content(ws, "support@v2")
    assert (second.kind, second.base) == ("full", None)
    assert second.files == first.files  # configuration, tokenizer and chat template, byte for byte
    assert (
        second.tensors.keys() == first.tensors.keys() and "lm_head.weight" not in second.tensors
    )  # it is tied
    changed = [name for name in first.tensors if second.tensors[name] != first.tensors[name]]
    assert changed == list(first.tensors)


def test_it_is_released_and_rolled_back(ws):
    assert ws.explain("decision-1").entry.status == "pass"
    assert ws.version("support@champion").label == "support@v2"
    ws.rollback("support")
    assert ws.version("support@champion").label == "support@v1" and ws.verify().intact


def test_what_is_stored_loads_again_bit_equal(ws, tmp_path):
    """Checked out, loaded by transformers and saved by it: the same tensors, so there is nothing to commit."""
    folder = ws.checkout("support@v2", tmp_path / "out").folder
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    saved, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    with pytest.raises(BadInput, match="there is nothing to commit"):
        ws.commit("support", folder)


def test_it_is_reproduced_bit_for_bit(ws):
    assert ws.reproduce("update-2").equal  # with the state of replay and EWC


def test_killed_and_run_again_is_the_same_version(origin, learned, copy, tmp_path):
    folder = copy(origin)
    recipe = tmp_path / "full.yaml"
    recipe.write_text("learning_rate: 0.003\n")
    command = ("update", "run", "support", "--data", "a", "--recipe", recipe, "--weights", "full")
    where = "meristem.training.reporting:ProgressCallback.on_step_end"
    assert run(folder, *command, at=Moment(where, signal.SIGKILL, nth=17)).code == -signal.SIGKILL
    done = run(folder, *command)
    assert done.code == 0 and "shards" not in done.err  # no bar of the libraries beside ours
    made, whole = ms.Workspace.open(folder), ms.Workspace.open(learned)
    assert made.version("support@v2").digest == whole.version("support@v2").digest
    made.close()
    whole.close()


def test_nan_stops_it_and_makes_no_version(ws, monkeypatch):
    original = ContinualTrainer._refuse_non_finite

    def poisoned(self, value):
        original(self, value * float("nan") if self.state.global_step == 2 else value)

    before = [v.label for v in ws.versions("support")]
    with monkeypatch.context() as patched, pytest.raises(NonFiniteLoss, match="at step 2"):
        patched.setattr(ContinualTrainer, "_refuse_non_finite", poisoned)
        ws.update("support", data=["b"], recipe={**FULL, "max_steps": 3})
    assert [v.label for v in ws.versions("support")] == before
    assert ws.resume("update-3").outcome.steps == 3


def test_an_adapter_grows_on_it_and_is_then_continued_as_one(ws):
    made = ws.update("support", data=["b"], recipe={"max_steps": 2}).version
    found = content(ws, made)
    assert (found.kind, found.base) == ("adapter", ws.version("support@v2").content)


def test_what_cannot_be_is_refused_before_training(released, copy):
    ws = ms.Workspace.open(copy(released))
    told = "support@v2 is of kind adapter: leave weights out to continue it, or `meristem model commit` its merge"
    with pytest.raises(BadInput, match=told):
        ws.update("support", data=["b"], recipe=FULL)
    with pytest.raises(BadInput, match="weights: full trains none; leave one of them out"):
        ws.update("support", data=["b"], recipe={**FULL, "lora": {"rank": 4}})
    assert [e.id for e in ws.records("update")] == ["update-1"]
    ws.close()


def test_quantized_weights_and_methods_that_rebuild_a_model_are_refused(fresh, files, tmp_path):
    ws = ms.Workspace.open(fresh)
    with pytest.raises(
        Clash, match="method o-lora needs an adapter or rebuilds the model, and weights: full trains it as"
    ):
        ws.update("support", data=["a"], methods=["o-lora"], recipe=FULL)
    folder = tmp_path / "quantized"
    shutil.copytree(files / "model", folder)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    ws.add_model("small", tier="foundation", source=str(folder))
    with pytest.raises(BadInput, match="cannot train the quantized weights of small@v1"):
        ws.update("small", data=["a"], recipe=FULL)
    assert not ws.records("plan") and not ws.records("update")
    ws.close()


def test_the_choice_stands_in_a_document_only_where_it_is_made():
    assert "weights" not in Recipe().document()
    full = resolve_recipe({"weights": "full"})
    assert full.document()["weights"] == "full" and Recipe.from_document(full.document()) == full
    assert (Recipe().learning_rate, full.learning_rate) == (5e-4, 1e-5)
    assert resolve_recipe({"learning_rate": 1e-3}, {"weights": "full"}).learning_rate == 1e-3


# In memory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def stored_as(model, folder, kinds):
    """A copy of the model folder with each tensor in the dtype that ``kinds(name)`` gives."""
    shutil.copytree(model, folder)
    tensors = {name: value.to(kinds(name)) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_half_precision_weights_are_trained_in_full_and_rounded_once(model, tmp_path):
    """Steps of 1e-5 that a bf16 weight cannot follow add up; each tensor goes back to the dtype it came in."""
    parent = stored_as(
        model, tmp_path / "mixed", lambda name: torch.float32 if "norm" in name else torch.bfloat16
    )
    trained, _ = trainable_model(Recipe(weights="full"), parent, None)
    before = load_file(parent / "model.safetensors")
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trained.parameters())
    with torch.no_grad():
        for _ in range(1000):
            for parameter in trained.parameters():
                parameter.add_(1e-5)
    expected = {name: value.clone() for name, value in trained.state_dict().items()}
    save_full(trained, parent, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
    for name, value in after.items():
        assert torch.equal(value, expected[name].to(value.dtype))
    name = "model.embed_tokens.weight"
    alone = before[name] + torch.tensor(1e-5, dtype=torch.bfloat16)
    assert (alone == before[name]).float().mean() > 0.8  # what most of them would have done by themselves
    assert (after[name] > before[name]).float().mean() > 0.99


def test_a_generation_config_that_transformers_will_not_save_is_carried(model, tmp_path):
    """Many models ship one; it must not stop a training at its first checkpoint."""
    parent = stored_as(model, tmp_path / "parent", lambda _: torch.float32)
    sampling = json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 1})
    (parent / "generation_config.json").write_text(sampling)
    recipe = Recipe(max_steps=1, checkpoint_steps=1, **RECIPE)
    trainer = cit.build_trainer(recipe, **job(parent, tmp_path / "run", three_tasks()["A"]))
    trainer.train()
    save_full(trainer.model, parent, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == sampling


def test_a_weight_that_its_dtype_cannot_hold_is_never_stored(model, tmp_path):
    parent = stored_as(model, tmp_path / "half", lambda _: torch.float16)
    trained, _ = trainable_model(Recipe(weights="full"), parent, None)
    with torch.no_grad():
        trained.model.norm.weight[3] = 1e5
    with pytest.raises(TrainingFailed, match=r"model\.norm\.weight grew beyond what torch\.float16 can hold"):
        save_full(trained, parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


RECIPE = {"dtype": "float32", "batch_size": 4, "learning_rate": 0.003, "weights": "full"}


def job(model, folder, rows, history=None):
    return {
        "folder": model, "base_folder": None, "rows": rows, "history": history or {}, "method_state": None,
        "output": folder, "callbacks": [],
    }  # fmt: skip


PAIRS = [
    {"id": f"r{n}", "task": "polite", "prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}
    for n in range(8)
]


def aligned(model, folder):
    recipe = Recipe(stage="ca", max_steps=4, checkpoint_steps=2, **RECIPE)
    return ca.build_trainer(recipe, **job(model, folder, PAIRS))


def test_the_reference_of_stage_ca_is_the_version_that_is_continued(model, tmp_path):
    """Before, during and after a training, and when one is resumed: never the weights under training."""
    start = load_file(model / "model.safetensors")

    def is_the_start(trainer):
        found = trainer.ref_model.state_dict()
        assert trainer.ref_model is not trainer.model and not trainer.ref_model.training
        return all(torch.equal(found[name], value) for name, value in start.items())

    whole = aligned(model, tmp_path / "run")
    assert is_the_start(whole)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    resumed = aligned(model, tmp_path / "again")
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert is_the_start(whole) and is_the_start(resumed)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
        assert name not in start or not torch.equal(start[name], value)


def test_texts_are_trained_on_in_all_weights(model, tmp_path):
    rows = [{"id": str(n), "task": "t", "text": "over and over " * 3} for n in range(8)]
    trainer = cpt.build_trainer(Recipe(stage="cpt", max_steps=8, **RECIPE), **job(model, tmp_path, rows))
    assert len(trainer.parameters()) == len(list(trainer.model.parameters()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", available())
def test_every_method_trains_all_weights_or_refuses_by_name(model, tmp_path, name):
    """After task A, whose rows are the history, the method is carried from B to C."""
    tasks = three_tasks()
    stage = "cit" if "cit" in load(name).stages else None
    assert stage, f"{name}: give this test rows of another stage"
    recipe = Recipe(max_steps=2, methods=[MethodConfig(name=name)], **RECIPE)

    def update(task, earlier, state):
        material = job(model, tmp_path / task, tasks[task], {t: tasks[t] for t in earlier})
        trainer = cit.build_trainer(recipe, **{**material, "method_state": state})
        before = {key: value.detach().clone() for key, value in trainer.parameters().items()}
        trainer.train()
        changed = [key for key, value in trainer.parameters().items() if not torch.equal(before[key], value)]
        assert all(bool(value.isfinite().all()) for value in trainer.parameters().values()) and changed
        return trainer.method_state()

    if load(name).replaces_architecture:
        with pytest.raises(Clash, match=name):
            update("B", "A", None)
        return
    update("C", "AB", update("B", "A", None))
