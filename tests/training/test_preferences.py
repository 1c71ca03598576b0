"""Preference trainers of TRL that no stage builds, around the seam: what the documentation says works."""

from __future__ import annotations

import inspect

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model, tiny_tokenizer
from tests.training.stream import QUIET, rows
from tests.training.trainers import data, make
from trl.experimental import cpo, orpo

from meristem.errors import Clash
from meristem.methods import EWC, LAE, ExperienceReplay
from meristem.training.continual import continual

FAMILY = {
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
    "cpo": (cpo.CPOTrainer, cpo.CPOConfig, {}),
    "simpo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}),
}


def lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(new_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def judged(kind, task):
    if kind != "kto":
        return data("dpo", 4, task)
    return [{**row, "label": number % 2 == 0} for number, row in enumerate(rows(4, task))]


def trained(kind, folder, methods, **options):
    trainer_class, config_class, more = FAMILY[kind]
    known = inspect.signature(config_class).parameters
    settings = {**QUIET, "max_steps": 3, "max_length": 64, "save_strategy": "steps", "save_steps": 2, **more}
    trainer = continual(trainer_class, methods)(
        model=lora(),
        args=config_class(str(folder), **{key: value for key, value in settings.items() if key in known}),
        train_dataset=judged(kind, "B"),
        processing_class=tiny_tokenizer(),
        task="B",
        history={"A": judged(kind, "A")},
    )
    trainer.train(**options)
    return trainer


@pytest.mark.parametrize("kind", FAMILY)
def test_replay_and_averaging_work_and_resume_and_likelihoods_are_refused(kind, tmp_path):
    methods = [ExperienceReplay(ratio=0.5), LAE()]
    trainer = trained(kind, tmp_path, methods)
    assert {name[0] for name in trainer.sample_ids} == {"A", "B"}
    state = trainer.method_state()
    assert {row["task"] for row in state["experience-replay"]["json"]["buffer"]["rows"]} == {"A", "B"}
    resumed = trained(
        kind, tmp_path, [ExperienceReplay(ratio=0.5), LAE()], resume_from_checkpoint=tmp_path / "checkpoint-2"
    )
    for name, value in trainer.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), name
    with pytest.raises(Clash, match="ewc needs the likelihood of rows"):
        continual(FAMILY[kind][0], [EWC()])


def test_a_precomputed_reference_trains_to_the_same_weights(tmp_path):
    """``DPOConfig(precompute_ref_log_probs=True)`` on one's own trainer: one reference pass instead of one an epoch."""
    found = []
    for precompute in (False, True):
        options = {"max_steps": 3, "task": "B", "history": {"A": data("dpo", 4)}, "model": lora()}
        methods = [ExperienceReplay(ratio=0.5), EWC(samples=2)]
        given = data("dpo", 4, "B")
        trainer = make("dpo", tmp_path, methods, given, precompute_ref_log_probs=precompute, **options)
        trainer.train()
        found.append({name: value.detach() for name, value in trainer.parameters().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [64, 10])
def test_a_batch_for_a_likelihood_is_the_prompt_and_its_chosen_answer(limit, tmp_path):
    """The same tokens as in the pairs that DPOTrainer collates, cut where it cuts them."""
    trainer = make("dpo", tmp_path, [], 4, max_length=limit, model=lora())
    (found,) = trainer.context.batches(batch_size=4)
    pairs = trainer.data_collator(list(trainer.train_dataset))
    order = [trainer.train_dataset["id"].index(f"A-{n}") for n in range(4)]
    tokens, mask = pairs["input_ids"][:4][order], pairs["completion_mask"][:4][order].bool()
    width = int(pairs["attention_mask"][:4].sum(1).max())
    assert torch.equal(found["input_ids"], tokens[:, :width]) and width <= limit
    assert torch.equal(found["labels"], tokens.masked_fill(~mask, -100)[:, :width])
    assert torch.equal(found["attention_mask"], pairs["attention_mask"][:4][order][:, :width])
    logits = trainer.model(tokens[:, :width], attention_mask=found["attention_mask"]).logits.log_softmax(-1)
    likely = logits[:, :-1].gather(2, tokens[:, 1:width, None])[..., 0]
    expected = -likely[mask[:, 1:width]].mean()
    torch.testing.assert_close(trainer.context.loss(found), expected, rtol=1e-5, atol=1e-6)
