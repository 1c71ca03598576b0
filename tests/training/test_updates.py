"""Updates: lost weights, what a stopped run leaves, disk errors in any disguise, and the lock."""

from __future__ import annotations

import errno

import pytest
from tests import acme

import meristem as ms
from meristem.errors import (
    BadInput,
    EnvironmentFailure,
    Interrupted,
    NonFiniteLoss,
    StateMoved,
    TrainingFailed,
)
from meristem.training import updates
from meristem.training.continual import ContinualTrainer, newest_complete_checkpoint


def test_a_huge_learning_rate_stops_with_step_and_samples(grown):
    """The loss becomes infinite: step and sample ids are named, the version line is as it was."""
    ws = ms.Workspace.open(grown)
    before = [v.label for v in ws.versions("support")]
    with pytest.raises(TrainingFailed, match=r"(loss is (nan|inf) at|in) step \d+ \(samples: b-"):
        ws.update("support", data=["b"], recipe={"learning_rate": 1e30})
    assert ws.records("update")[-1].status == "failed"
    assert [v.label for v in ws.versions("support")] == before
    assert ws.version("support@challenger").label == "support@v4" and ws.verify().intact
    ws.close()


def test_the_last_good_checkpoint_is_kept(released, copy, monkeypatch):
    """NaN at step 23: the checkpoint of step 20 is whole, and once the cause is gone the same call finishes."""
    folder = copy(released)
    ws = ms.Workspace.open(folder)
    original = ContinualTrainer._refuse_non_finite

    def poisoned(self, value):
        original(self, value * float("nan") if self.state.global_step == 22 else value)

    with monkeypatch.context() as patched:
        patched.setattr(ContinualTrainer, "_refuse_non_finite", poisoned)
        with pytest.raises(NonFiniteLoss) as stopped:
            ws.update("support", data=["b"])
    assert stopped.value.step == 22 and len(stopped.value.ids) == 8
    run = folder / ".meristem/runs/update-2"
    assert newest_complete_checkpoint(run).name == "checkpoint-20"
    assert ws.resume("update-2").outcome.steps == 30
    assert not run.exists()
    ws.close()


def test_weights_that_became_nan_are_never_saved(released, copy, monkeypatch):
    """A finite loss whose step destroys the weights: no checkpoint and no version of it, samples named."""
    import torch

    from meristem.training.reporting import ProgressCallback

    folder = copy(released)
    ws = ms.Workspace.open(folder)
    original = ProgressCallback.on_step_end

    def destroyed(self, args, state, control, **kwargs):
        if state.global_step == 20:
            with torch.no_grad():
                next(iter(self._trainer.parameters().values())).fill_(float("nan"))
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressCallback, "on_step_end", destroyed)
    with pytest.raises(TrainingFailed, match=r"became NaN or infinite in step 20 \(samples: b-"):
        ws.update("support", data=["b"])
    run = folder / ".meristem/runs/update-2"
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-10"]
    ws.close()


def test_interrupted_twice_and_resumed_is_the_same_version(released, trained, copy, monkeypatch):
    """Stopped after step 7 and again after step 19, with replay and EWC: the version of an undisturbed run."""
    from meristem.training.reporting import ProgressCallback

    ws = ms.Workspace.open(copy(released))
    original = ProgressCallback.on_step_end
    for step in (7, 19):

        def asked(self, args, state, control, step=step, **kwargs):
            self._interruption.requested |= state.global_step == step
            return original(self, args, state, control, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(ProgressCallback, "on_step_end", asked)
            with pytest.raises(Interrupted, match=f"stopped at step {step} of 30"):
                ws.update("support", data=["b"], methods=acme.REPLAY_AND_EWC)
        assert ws.records("update")[-1].status == "interrupted"
    made = ws.update("support", data=["b"], methods=acme.REPLAY_AND_EWC)
    whole = ms.Workspace.open(trained)
    expected = whole.update_result("update-3")
    assert made.version.digest == expected.version.digest
    assert made.version.record.assets == expected.version.record.assets  # the methods' state too
    assert made.outcome.curve == expected.outcome.curve and made.outcome.tokens == expected.outcome.tokens
    ws.close()
    whole.close()


def test_one_process_at_a_time(grown):
    ws = ms.Workspace.open(grown)
    entry = ws.record("update-3")
    with updates._locked(ws.store, entry), pytest.raises(StateMoved, match=r"being run by process \d+"):
        ws.resume("update-3")
    assert ws.resume("update-3").version.label == "support@v4"  # the lock is gone with its holder
    ws.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "..." }'),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_errors_in_any_disguise(tmp_path, error):
    with pytest.raises(EnvironmentFailure, match=str(tmp_path)), updates.disk_errors(tmp_path):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("saving failed") from cause


def test_other_errors_keep_their_kind(tmp_path):
    for error in (
        ValueError("no"),
        BadInput("bad"),
        FileNotFoundError(errno.ENOENT, "gone"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)), updates.disk_errors(tmp_path):
            raise error


def test_a_store_that_cannot_be_written_does_not_hide_the_reason(released, copy, monkeypatch):
    """The run stops on NaN while the disk is full: the NaN is what is told."""
    ws = ms.Workspace.open(copy(released))

    def full(*_):
        raise EnvironmentFailure("disk full")

    monkeypatch.setattr(updates.ledger, "set_status", full)
    with pytest.raises(TrainingFailed):
        ws.update("support", data=["b"], recipe={"learning_rate": 1e30})
    ws.close()


def test_history_holds_earlier_data_oldest_first(grown):
    ws = ms.Workspace.open(grown)
    with ws.store.database.read() as connection:
        found = updates.history_data(connection, ws.version("support@v4"))
    assert found == [ws.asset("dataset", name).digest for name in "ab"]
    ws.close()
