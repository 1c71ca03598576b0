"""Stage ``ca``: the reference is the version that is continued, and nothing of it is saved or trained."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from tests.tiny import tiny_model

from meristem.config import MethodConfig, Recipe
from meristem.errors import BadInput, Clash
from meristem.methods.base import trainable
from meristem.training import ca
from meristem.training.adapters import trainable_model
from meristem.training.continual import newest_complete_checkpoint

ROWS = [
    {"id": f"r{n}", "task": "polite", "prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}
    for n in range(8)
]
RECIPE = {
    "stage": "ca",
    "dtype": "float32",
    "batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.01,
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parent(model, tmp_path_factory):
    """An adapter that answers quite otherwise than its base."""
    folder = tmp_path_factory.mktemp("parent")
    made, tokenizer = trainable_model(Recipe(**RECIPE), model, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(made).items():
            if "lora_B" in name:
                parameter.normal_(0, 4.0)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(model, parent, output, *, rows=ROWS, history=None, **settings):
    return ca.build_trainer(
        Recipe(**{**RECIPE, **settings}),
        folder=parent or model,
        base_folder=model if parent else None,
        rows=rows,
        history=history or {},
        method_state=None,
        output=output,
        callbacks=[],
    )


def weights(trainer, adapter):
    return {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if f".{adapter}." in name
    }


def test_the_reference_is_the_parent_and_not_the_bare_base(model, parent, tmp_path):
    trainer = build(model, parent, tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs.pop("meristem_tags", None)
    with torch.no_grad():
        reference = trainer.compute_ref_log_probs(trainer.model, inputs)
        own = PeftModel.from_pretrained(trainable_model(Recipe(**RECIPE), model, None)[0].unload(), parent)
        parents = own(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    labels, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
    expected = (parents[:, :-1].gather(2, labels[..., None])[..., 0] * mask).sum(1)
    found = torch.cat([part.reshape(-1) for part in reference[:2]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    frozen = weights(trainer, "ref")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same at first
    assert losses[-1] < losses[0]
    after = weights(trainer, "ref")
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(".ref." in name for name in trainer.parameters())


def test_without_the_parents_adapter_the_first_loss_would_differ(model, parent, tmp_path):
    """What TRL does without the copy, so that the test above means something."""
    trainer = build(model, parent, tmp_path)
    trainer.model.delete_adapter("ref")
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first - math.log(2)) > 0.01


def test_interrupted_and_resumed_gives_the_same_weights(model, parent, tmp_path):
    whole = build(model, parent, tmp_path / "whole")
    whole.train()
    build(model, parent, tmp_path / "cut").train()
    (newest,) = (tmp_path / "cut").glob("checkpoint-4")
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    resumed = build(model, parent, tmp_path / "cut")
    kept = newest_complete_checkpoint(tmp_path / "cut")
    assert kept.name == "checkpoint-2"
    resumed.train(resume_from_checkpoint=kept)
    for adapter in ("default", "ref"):
        expected = weights(whole, adapter)
        found = weights(resumed, adapter)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_replay_mixes_pairs_and_o_lora_is_refused_by_name(model, tmp_path):
    old = [{**row, "id": f"old-{row['id']}", "task": "brief"} for row in ROWS]
    replay = [MethodConfig(name="experience-replay", arguments={"ratio": 0.5})]
    trainer = build(model, None, tmp_path, history={"brief": old}, methods=replay)
    assert sorted(set(trainer.train_dataset["task"])) == ["brief", "polite"]
    assert len(trainer.train_dataset) == 16
    with pytest.raises(Clash, match="method o-lora works in stages cit, cpt, not in ca"):
        build(model, None, tmp_path, methods=[MethodConfig(name="o-lora")])


def test_rows_that_would_be_cut_or_do_not_fit_are_refused(model, tmp_path):
    rows = [*ROWS, {**ROWS[0], "id": "long", "rejected": "n" * 90}]
    with pytest.raises(BadInput, match=r"1 rows are longer than max_length 100, .*: long \("):
        build(model, None, tmp_path, rows=rows, max_length=100)
    with pytest.raises(BadInput, match="row x: stage ca needs prompt, chosen and rejected"):
        build(model, None, tmp_path, rows=[{"id": "x", "task": "t", "prompt": "a", "completion": "b"}])
