"""Sequential fine-tuning, per-task and joint training, against what they are defined as (tests/training: claims)."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.adapters import adapter
from tests.tiny import new_model
from tests.training.stream import rows, sft, weights
from trl import SFTTrainer

from meristem.errors import BadInput, Clash
from meristem.methods import EWC, Context, Joint, PerTask, SeqFinetune, build
from meristem.methods.base import trainable
from meristem.training.continual import continual

BRIEF = {"max_steps": 2, "per_device_train_batch_size": 2, "task": "B"}


def test_sequential_fine_tuning_is_the_trainer_without_a_method(tmp_path):
    ends = []
    for methods in ([], [SeqFinetune()]):
        trainer = sft(tmp_path, methods, rows(4, "B"), model=adapter(), history={"A": rows(2)}, **BRIEF)
        trainer.train()
        ends.append(weights(trainer.model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert trainer.method_state() == {"seq-finetune": {"tensors": {}, "json": {}}}


def mixed(new, history, seed=0, task="C"):
    return list(Joint().prepare_data(new, Context(task, seed=seed, history=history)))


def test_joint_training_has_every_row_once():
    new, history = rows(3, "C"), {"A": rows(4, "A"), "B": rows(2, "B")}
    found = mixed(new, history)
    assert sorted(row["id"] for row in found) == sorted(
        row["id"] for row in [*new, *history["A"], *history["B"]]
    )
    assert found == mixed(copy.deepcopy(new), copy.deepcopy(history))  # a function of seed, task and rows
    assert found != mixed(new, history, seed=1) and found != mixed(new, history, task="D")
    assert mixed(new, {}) == new and mixed([], history) == []
    found[0]["prompt"] = "changed"
    assert all(row["prompt"] != "changed" for row in [*new, *history["A"], *history["B"]])


def test_joint_training_counts_a_row_by_all_that_it_says():
    """Rows numbered by the seam share ids; a row that came back in a later data set is one row."""
    row = {"id": "row-0", "task": "A", "prompt": "x", "completion": "1"}
    other = {**row, "completion": "2"}
    again = {**row, "slice": None}
    assert len(mixed([{**row, "task": "B"}], {"A": [row, other, again]})) == 3
    assert mixed([row, row], {"A": [again]}) == [row, row]  # what the user gives twice stays
    with pytest.raises(BadInput, match=r"joint: kept row 'row-0' of task 'A' has \['text'\]"):
        mixed([row], {"A": [{"id": "row-0", "task": "A", "text": "x"}]})


def test_per_task_takes_a_fresh_adapter_only(tmp_path):
    model = adapter()
    first = sft(tmp_path, [PerTask()], rows(4), model=model, **BRIEF)
    first.train()
    with pytest.raises(Clash, match=r"per-task starts each task from a fresh adapter.*pass the base model"):
        sft(tmp_path, [PerTask()], rows(4, "B"), model=model, **BRIEF)
    assert PerTask.fresh_adapter and any(p.any() for n, p in trainable(model).items() if "lora_B" in n)


def test_per_task_takes_an_adapter_whose_initialization_does_not_leave_b_zero(tmp_path):
    lora = LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(new_model(), lora)
    assert any(p.any() for name, p in trainable(model).items() if "lora_B" in name)
    sft(tmp_path, [PerTask()], rows(4), model=model, **BRIEF)


@pytest.mark.parametrize("name", ["seq-finetune", "per-task", "joint"])
def test_a_baseline_goes_with_no_other_method(name):
    for methods in ([build(name), EWC()], [EWC(), build(name)]):
        with pytest.raises(
            Clash, match=f"method {name} is a baseline and goes with no other: drop it, or ewc"
        ):
            continual(SFTTrainer, methods)
