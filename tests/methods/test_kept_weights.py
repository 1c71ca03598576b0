"""What MER, LAE and distillation share: copies of the trained weights that outlive a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.methods.adapters import adapter
from tests.methods.streams import BRIEF, saved, second, trained_adapter
from tests.training.stream import rows, sft, weights
from tests.training.trainers import make

from meristem.errors import Clash
from meristem.methods.base import trainable
from meristem.methods.optimization.lae import LAE
from meristem.methods.regularization.ewc import EWC
from meristem.methods.regularization.old_teacher_distill import OldTeacherDistill
from meristem.methods.replay.mer import MER
from meristem.training import _upstream


def three():
    return [MER(ratio=0.4, every=3), OldTeacherDistill(hidden=0.1), LAE(decay=0.9)]


def test_a_new_process_that_is_killed_and_one_that_resumes_end_in_the_bits_of_memory(tmp_path):
    """All three at once on a continued adapter; the checkpoint of step 4 is inside MER's second window."""
    model, state = trained_adapter(tmp_path, three())
    whole = second(tmp_path, "whole", three(), model=model, method_state=state)
    start = weights(whole.model)
    whole.train()
    assert any(not torch.equal(start[name], value) for name, value in weights(whole.model).items())

    code = (
        "from pathlib import Path; from tests.methods.streams import Kill, second; "
        "from tests.methods.test_kept_weights import three; "
        f"second(Path({str(tmp_path)!r}), 'cut', three(), callbacks=[Kill()]).train()"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == 9
    resumed = second(tmp_path, "cut", three())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)

    ours, theirs = resumed.method_state(), whole.method_state()
    for name in ("mer", "lae", "old-teacher-distill"):
        torch.testing.assert_close(ours[name]["tensors"], theirs[name]["tensors"], rtol=0, atol=0)
        assert ours[name]["json"] == theirs[name]["json"]
    assert not ours["mer"]["tensors"] and "steps" not in ours["mer"]["json"]  # no window is carried over,
    assert not ours["old-teacher-distill"]["tensors"]  # and no teacher: the next update has its own
    assert {row["task"] for row in ours["mer"]["json"]["buffer"]["rows"]} == {"A", "B"}
    lae = ours["lae"]["tensors"]
    online = {name: value for name, value in lae.items() if name.startswith("online")}
    assert any(not torch.equal(v, lae[k.replace("online", "offline")]) for k, v in online.items())

    resumed.model.save_pretrained(str(tmp_path / "version"))  # PEFT alone reads what was trained
    served, ours = (dict(trainable(m)) for m in (saved(tmp_path / "version"), resumed.model))
    torch.testing.assert_close(served, ours, rtol=0, atol=0)


def test_lae_stands_anywhere_in_the_list(tmp_path):
    """Two updates, LAE first and last: the others find, edit and keep the weights in training, it serves the rest."""
    ends = []
    for place in (0, 3):
        model, state = adapter(), None
        for task in "AB":
            methods = [MER(ratio=0.4, every=3), OldTeacherDistill(), EWC(samples=2, strength=100)]
            methods.insert(place, LAE(decay=0.9))
            options = {**BRIEF, "method_state": state, "model": model}
            trainer = sft(tmp_path / f"{place}{task}", methods, rows(6, task), task=task, **options)
            trainer.train()
            model, state = trainer.model, trainer.method_state()
        ends.append((dict(trainable(model)), state))
    (one, ours), (other, theirs) = ends
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    for name, found in ours.items():
        torch.testing.assert_close(found["tensors"], theirs[name]["tensors"], rtol=0, atol=0)
    lae, ewc = ours["lae"]["tensors"], ours["ewc"]["tensors"]
    for name, p in one.items():
        mean = (lae[f"online.{name}"] + lae[f"offline.{name}"]) / 2
        torch.testing.assert_close(p.detach(), mean)
        assert torch.equal(ewc[f"anchor.{name}"], lae[f"online.{name}"])


@pytest.mark.parametrize("kind", ["plain", "sft", "cpt", "dpo", "reward"])
def test_train_with_each_trainer_of_their_stages(kind, tmp_path):
    methods = [m for m in three() if kind != "reward" or m.name != "old-teacher-distill"]
    given = [{"text": f"some text {n}"} for n in range(4)] if kind == "cpt" else 4
    trainer = make("sft" if kind == "cpt" else kind, tmp_path, methods, given, max_steps=4)
    before = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainable(trainer.model).items())
    assert trainer.method_state()["lae"]["tensors"]


@pytest.mark.parametrize("method", three())
@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused_by_name(method, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(_upstream, "is_initialized", lambda: True)
    sharded = type("State", (), {"distributed_type": f"DistributedType.{kind}"})
    monkeypatch.setattr(_upstream, "AcceleratorState", sharded)
    with pytest.raises(Clash, match=rf"method {method.name} needs whole weights, .* shards them \({kind}\)"):
        sft(tmp_path, [method], rows(2))
