"""Checkpoints: method state, the COMPLETE mark, and a resume that changes no bit."""

import copy
import itertools
import json
import os
import signal

import pytest
import torch
from peft import LoraConfig
from tests.training.stream import rows, sft, weights
from transformers import TrainerCallback

from meristem.errors import BadInput
from meristem.methods import EWC, ExperienceReplay
from meristem.training import _checkpoint
from meristem.training.continual import newest_complete_checkpoint


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def make(folder, **options):
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
        "task": "B",
        **options,
    }
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    methods = [ExperienceReplay(ratio=0.4, capacity=6), EWC(samples=4)]
    torch.manual_seed(0)  # TRL initializes the adapter before Hugging Face's trainer seeds
    return sft(folder, methods, rows(6, "B"), peft_config=lora, history={"A": rows(8, "A")}, **options)


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", callbacks=[Stop()], save_total_limit=1).train()
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    start = weights(make(tmp_path / "start").model)
    assert any(not torch.equal(start[name], value) for name, value in weights(whole.model).items())
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    a, b = whole.method_state(), resumed.method_state()
    torch.testing.assert_close(a["ewc"]["tensors"], b["ewc"]["tensors"], rtol=0, atol=0)
    assert a["experience-replay"] == b["experience-replay"]
    assert {row["task"] for row in b["experience-replay"]["json"]["buffer"]["rows"]} == {"A", "B"}


def test_saved_method_state_goes_on_as_the_one_in_memory(tmp_path):
    def update(folder, task, **given):
        trainer = sft(tmp_path / folder, [EWC(samples=4)], rows(6, task), max_steps=2, task=task, **given)
        trainer.train()
        return trainer

    first = update("first", "A", save_strategy="steps", save_steps=2)
    first.save_method_state(tmp_path / "state")
    ends = [
        update(str(at), "B", method_state=state, model=copy.deepcopy(first.model))
        for at, state in enumerate((first.method_state(), tmp_path / "state", str(tmp_path / "state")))
    ]
    for other in ends[1:]:
        torch.testing.assert_close(weights(other.model), weights(ends[0].model), rtol=0, atol=0)
        a, b = (one.method_state()["ewc"] for one in (other, ends[0]))
        torch.testing.assert_close(a["tensors"], b["tensors"], rtol=0, atol=0)
        assert a["json"] == b["json"]
    for folder, told in (
        ("first/checkpoint-2", "a checkpoint on the way"),
        ("nowhere", "cut off while being"),
    ):
        with pytest.raises(BadInput, match=told):
            update("refused", "B", method_state=tmp_path / folder)


def test_only_complete_folders_are_resumed_from(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(BadInput, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    newest, older = tmp_path / "checkpoint-7", tmp_path / "checkpoint-6"
    assert newest_complete_checkpoint(tmp_path) == newest
    states = _checkpoint.read(newest)
    assert set(states) == {"ewc", "experience-replay"} and states["ewc"]["tensors"]
    weights_file = newest / "adapter_model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert newest_complete_checkpoint(tmp_path) == older
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors has changed"):
        trainer.train(resume_from_checkpoint=str(newest))
    weights_file.write_bytes(whole)
    mark = newest / "meristem" / "COMPLETE"
    edited = json.loads(mark.read_text())
    edited["files"].pop("adapter_model.safetensors")
    mark.write_text(json.dumps(edited))
    with pytest.raises(BadInput, match="damaged"):
        trainer.train(resume_from_checkpoint=str(newest))
    mark.unlink()
    with pytest.raises(BadInput, match="cut off while being written"):
        trainer.train(resume_from_checkpoint=str(newest))
    (older / "optimizer.pt").unlink()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_killed_at_any_write_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """A process dies before each fsync and each rename of the second checkpoint; the first must be found, or both."""
    newest, first = [], tmp_path / "checkpoint-2"
    write = _checkpoint.write

    def dies_at_each_point(folder, states, step, *finished):
        while step == 4:
            assert not (folder / "meristem").exists() or newest  # Hugging Face's files are there before ours
            child = os.fork()
            if child == 0:
                _die_after(len(newest))
                write(folder, states, step, *finished)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            newest.append(newest_complete_checkpoint(tmp_path))
            if newest[-1] == folder:
                assert {k: v["json"] for k, v in _checkpoint.read(folder).items()} == {
                    k: v["json"] for k, v in states.items()
                }
        write(folder, states, step)

    monkeypatch.setattr(_checkpoint, "write", dies_at_each_point)
    make(tmp_path, max_steps=4, save_total_limit=1).train()
    assert newest[0] == first and newest[-1] == tmp_path / "checkpoint-4" and len(newest) > 20
    assert newest == sorted(newest) and newest.count(first) >= len(newest) - 3  # the mark is the last rename
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def _die_after(count):
    """Kills this process instead of the call number ``count`` (from 0) of os.fsync or os.replace."""
    calls = itertools.count()
    for name in ("fsync", "replace"):

        def counted(*args, original=getattr(os, name)):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, name, counted)


def test_another_set_of_methods_cannot_resume(tmp_path):
    make(tmp_path, max_steps=2).train()
    other = sft(tmp_path, [EWC()], rows(4), max_steps=4)
    with pytest.raises(BadInput, match="resume with the same ones"):
        other.train(resume_from_checkpoint=True)
