"""Updates: lost weights, what a stopped run leaves, disk errors in any disguise, and the lock."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from tests import acme

import meristem as ms
from meristem.ecosystem import ledger
from meristem.ecosystem.records import Plan
from meristem.errors import (
    BadInput,
    EnvironmentFailure,
    Interrupted,
    NonFiniteLoss,
    StateMoved,
    TrainingFailed,
)
from meristem.training import stopwatch, updates
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
        spent = ws.root / ".meristem/runs/update-2/seconds.json"
        assert json.loads(spent.read_bytes())["seconds"] > 0
    spent.write_text('{"seconds": 5000}')  # what the earlier processes took counts
    made = ws.update("support", data=["b"], methods=acme.REPLAY_AND_EWC)
    whole = ms.Workspace.open(trained)
    expected = whole.update_result("update-3")
    assert made.version.digest == expected.version.digest
    assert 5000 < made.outcome.seconds < 6000
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


def test_an_update_that_was_closed_on_another_machine_makes_no_version(released, copy, monkeypatch):
    """The lock of a run holds on one machine; the store tells the others at the commit."""
    ws = ms.Workspace.open(copy(released))
    train, before = updates.train, [v.label for v in ws.versions("support")]

    def closed_meanwhile(store, update, *arguments, **options):
        trained = train(store, update, *arguments, **options)
        with store.transaction("lee", "no longer wanted") as tx:
            ledger.set_status(tx, ledger.find(tx.connection, "update-2"), "closed")
        return trained

    monkeypatch.setattr(updates, "train", closed_meanwhile)
    with pytest.raises(StateMoved, match="update-2 is closed by now"):
        ws.update("support", data=["b"])
    assert ws.record("update-2").status == "closed" and ws.verify().intact
    assert [v.label for v in ws.versions("support")] == before
    ws.close()


def test_history_holds_earlier_data_oldest_first(grown):
    ws = ms.Workspace.open(grown)
    with ws.store.database.read() as connection:
        found = updates.history_data(connection, ws.version("support@v4"))
    assert found == [ws.asset("dataset", name).digest for name in "ab"]
    ws.close()


def test_time_adds_up_over_processes_and_is_kept_at_every_checkpoint(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    first = stopwatch.Stopwatch(tmp_path / "seconds.json")
    now[0] += 20
    first.note()
    now[0] += 5  # killed: no exit
    with stopwatch.Stopwatch(tmp_path / "seconds.json") as second:
        now[0] += 3
        assert second.seconds() == 23
    assert stopwatch.Stopwatch(tmp_path / "seconds.json").seconds() == 23


def test_a_run_killed_after_a_checkpoint_has_kept_its_time(released, copy, monkeypatch):
    """As after SIGKILL: what only the end of the ``with`` would have written is not there."""
    ws = ms.Workspace.open(copy(released))
    monkeypatch.setattr(stopwatch.Stopwatch, "__exit__", lambda *_: None)
    stop_at(monkeypatch, 12, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        ws.update("support", data=["b"])
    assert json.loads((ws.root / ".meristem/runs/update-2/seconds.json").read_bytes())["seconds"] > 0
    ws.close()


def stop_at(monkeypatch, step, error):
    from meristem.training.reporting import ProgressCallback

    original = ProgressCallback.on_step_end

    def stopped(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise error
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressCallback, "on_step_end", stopped)


def test_a_run_begun_with_other_libraries_is_not_continued(released, copy, monkeypatch):
    ws = ms.Workspace.open(copy(released))
    with monkeypatch.context() as patched:
        stop_at(patched, 12, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            ws.update("support", data=["b"])
    here = updates.code_versions()
    monkeypatch.setattr(updates, "code_versions", lambda: {**here, "torch": "99.1"})
    told = rf"update-2 was begun with torch {here['torch'].replace('+', '.')} \(now 99\.1\): .* `meristem update run`"
    with pytest.raises(BadInput, match=told):
        ws.resume("update-2")
    assert ws.record("update-2").status == "interrupted"
    assert ws.resume("update-1").version.label == "support@v2"  # what is done is not run
    again = ws.update("support", data=["b"])
    assert again.id == "update-3" and again.version.record.code["torch"] == "99.1"
    ws.close()


def test_events_hold_no_text_of_libraries(released, copy, monkeypatch):
    """Theirs can quote training rows; ours name steps and ids."""
    ws = ms.Workspace.open(copy(released))
    for error, reason in (
        (ValueError("row: B ash ? 5"), "ValueError"),
        (BadInput("the chat template refuses: B ash ? 5"), "BadInput"),
        (NonFiniteLoss(float("nan"), 3, ["b-ash"]), str(NonFiniteLoss(float("nan"), 3, ["b-ash"]))),
        (Interrupted("stopped at step 3 of 30"), "stopped at step 3 of 30"),
    ):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patched, pytest.raises(type(error)):
            patched.setattr(updates, "train", fails)
            ws.update("support", data=["b"], recipe={"seed": len(reason)})
        told = list(ws.events())[-1]
        assert told.kind in ("update.failed", "update.interrupted") and told.reason == reason
    ws.close()


def test_the_recipe_is_stored_once_and_named_by_its_asset(released):
    ws = ms.Workspace.open(released)
    assert ws.asset("recipe", "support").record.facts == {"document": ws.version("support").record.recipe}
    ws.close()


def test_an_adapter_s_own_tokenizer_goes_on_in_the_next_version(released, copy, tmp_path):
    from tests.tiny import tiny_tokenizer

    ws = ms.Workspace.open(copy(released))
    folder = ws.checkout("support", tmp_path / "adapter").folder
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    parent = ws.add_model("mail", tier="application", base="support", source=str(folder))
    made = ws.update("mail", data=["b"], recipe={"max_steps": 1}).version
    with ws.store.database.read() as connection:
        old, new = (updates.versions.content_of(connection, v.content) for v in (parent, made))
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(old.files)
    assert {k: v for k, v in new.files.items() if k != "adapter_config.json"} == {
        k: v for k, v in old.files.items() if k != "adapter_config.json"
    }
    assert set(new.tensors) == set(old.tensors) and new.tensors != old.tensors
    ws.close()


def test_an_inconclusive_candidate_is_judged_again_on_a_larger_suite_without_training(
    released, copy, monkeypatch, tmp_path
):
    folder = copy(released)
    acme.gates(folder, "{gate: improvement, suites: new}")
    ws = ms.Workspace.open(folder, actor="kim")
    ws.add_suite("b", suite_of(tmp_path, acme.test_items("b")[:2]))
    first = ws.update("support", data=["b"])
    assert ws.propose(first.version).outcome == "inconclusive"
    larger = [
        {**item, "id": f"{item['id']}!", "prompt": f"{item['prompt']}!"} for item in acme.test_items("b")
    ]
    newest = ws.add_suite("b", suite_of(tmp_path, acme.test_items("b") + larger))

    def trained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(updates, "train", trained)
    again = ws.update("support", data=["b"])
    assert (again.id, again.version.digest) == (first.id, first.version.digest)
    decision = ws.propose(again.version)
    plan = ws.records("plan")[-1]
    assert decision.outcome == "pass" and decision.record.plan == plan.digest
    assert plan.as_(Plan).suites == {"b": newest.digest}
    ws.close()


def suite_of(folder: Path, items):
    path = acme.suite_file(folder / "b.yaml", "b")
    acme.lines(folder / "b-b-items.jsonl", items)
    return path
