"""Failures survived: real processes that are interrupted, killed, starved of disk, or in each other's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import acme
from tests.cli.process import Command, Limits, Moment, run

import meristem as ms

UPDATE = ("update", "run", "support", "--data", "b", "--method", acme.REPLAY_AND_EWC[0])
UPDATE = (*UPDATE, "--method", acme.REPLAY_AND_EWC[1])
STEP_END = "meristem.training.reporting:ProgressCallback.on_step_end"


def content(folder, reference):
    ws = ms.Workspace.open(folder)
    digest = ws.version(reference).content
    ws.close()
    return digest


def intact(folder):
    ws = ms.Workspace.open(folder)
    audit = ws.verify()
    ws.close()
    return audit.intact and not acme.leftovers(folder)


MOMENTS = {
    "loading": Moment("meristem.training.adapters:load_for_training"),
    "the first step": Moment(STEP_END, nth=1),
    "in the middle": Moment(STEP_END, nth=17),
    "the last step": Moment(STEP_END, nth=30),
    "the methods' finish": Moment("meristem.methods.regularization.ewc:EWC.finish"),
    "the commit": Moment("meristem.ecosystem.versions:create", after=True),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_during_an_update(released, trained, copy, moment):
    """Exit 130, nothing visible has changed, and the same command gives the weights of an undisturbed run."""
    folder = copy(released)
    stopped = run(folder, *UPDATE, at=moment)
    assert stopped.code in (0, 130), stopped.err
    if stopped.code == 130:  # else it came when nothing was left to interrupt
        assert "the same command" in stopped.err and "Traceback" not in stopped.err
        assert content(folder, "support@v2") == content(folder, "support@challenger")
    else:
        assert moment is MOMENTS["the last step"]
    assert run(folder, *UPDATE).code == 0
    assert content(folder, "support@v3") == content(trained, "support@v4")
    assert intact(folder)
    assert not list((folder / ".meristem/runs").glob("update-2/*"))


@pytest.mark.parametrize("name", ["the first step", "the methods' finish", "the commit"])
def test_kill_during_an_update(released, trained, copy, name):
    """SIGKILL leaves no chance to tidy up; the same command still gives the same weights."""
    folder, moment = copy(released), MOMENTS[name]
    killed = run(folder, *UPDATE, at=Moment(moment.where, signal.SIGKILL, moment.nth, moment.after))
    assert killed.code == -signal.SIGKILL
    assert content(folder, "support@challenger") == content(folder, "support@v2")
    assert run(folder, *UPDATE).code == 0
    assert content(folder, "support@v3") == content(trained, "support@v4")
    assert intact(folder)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    "where",
    [
        "meristem.evaluation.tasks.choice:Choice.run",
        "meristem.evaluation.journal:JournalFile.append",
        "meristem.store.store:Store.put",
    ],
)
def test_an_interrupted_evaluation(fresh, copy, kind, where):
    """Half an evaluation is none; the same command goes on and ends in the same bytes."""
    whole = copy(fresh, "whole")
    command = ("--json", "eval", "run", "base@v1", "--suite", "a")
    stopped = run(fresh, *command, at=Moment(where, kind))
    assert stopped.code == (130 if kind == signal.SIGINT else -kind)
    ws = ms.Workspace.open(fresh)
    known = len(ws.evaluations())
    ws.close()
    done = run(fresh, *command)
    assert done.code == 0 and '"cached": false' in done.out
    ws = ms.Workspace.open(fresh)
    assert len(ws.evaluations()) == known + 1
    ws.close()
    assert done.out == run(whole, *command).out
    assert not list((fresh / ".meristem/runs").glob("evaluation-*"))
    assert intact(fresh)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("where", "after"),
    [
        ("meristem.release.rollout:check_bytes", False),
        ("meristem.ecosystem.aliases:move", True),
        ("meristem.release.rollout:promote", True),
    ],
)
def test_an_interrupted_promotion(grown, kind, where, after):
    """The pointer moves with its evidence or not at all, and once, however often the command is repeated."""
    stopped = run(grown, "release", "promote", "decision-3", at=Moment(where, kind, after=after))
    assert stopped.code == (130 if kind == signal.SIGINT else -kind)
    ws = ms.Workspace.open(grown)
    moved = ws.version("support").number == 4
    assert moved == (where == "meristem.release.rollout:promote") == (len(ws.history("support")) == 2)
    ws.close()
    for _ in range(2):
        assert run(grown, "release", "promote", "decision-3").code == 0
    ws = ms.Workspace.open(grown)
    assert ws.version("support").number == 4 and len(ws.history("support")) == 2
    ws.close()
    assert intact(grown)


def test_a_second_process_on_the_same_update_is_told(released, copy, tmp_path):
    """Exit 4 while the first one runs it; the first one is not disturbed."""
    folder = copy(released)
    first = Command(folder, *UPDATE, at=Moment(STEP_END, signal.SIGSTOP, nth=5))
    lock = folder / ".meristem/runs/update-2.lock"
    deadline = time.monotonic() + 100
    while not list((folder / ".meristem/runs").glob("update-2/*")) and time.monotonic() < deadline:
        if lock.exists() and _stopped(first.process.pid):
            break
        time.sleep(0.05)
    second = run(folder, *UPDATE)
    assert second.code == 4, second.err
    assert second.err.strip().endswith(f"being run by process {first.process.pid}; wait for it or stop it")
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait().code == 0
    assert intact(folder)


def _stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_two_terminals_promote_at_once(trained, copy):
    """Two decisions against v2: one is released, the other exits 4 and says that the champion moved."""
    folder = copy(trained)
    acme.gates(folder, "{gate: improvement, suites: new}")
    ws = ms.Workspace.open(folder, actor="kim")
    version = ws.version("support@v3")
    from meristem.release import decisions

    entry = decisions.propose(ws.store, "kim", ws.settings("support"), ws.evaluator(), version, None)
    ws.close()
    assert entry.status == "pass"
    terminals = [Command(folder, "release", "promote", name) for name in (entry.id, "decision-3")]
    ended = [terminal.wait() for terminal in terminals]
    assert sorted(done.code for done in ended) == [0, 4]
    winner = ended[0].code != 0
    loser = ended[0] if winner else ended[1]
    assert f"the champion moved from v2 to v{4 if winner else 3}" in loser.err
    assert loser.out == "" and len(loser.err.splitlines()) == 1
    ws = ms.Workspace.open(folder)
    assert len(ws.history("support")) == 2
    ws.close()
    assert intact(folder)


@pytest.fixture
def locked(grown):
    """``locked(True)`` takes from everybody the right to write in a grown workspace, ``locked(False)`` gives it back."""

    def lock(on):
        for path in [grown, *grown.rglob("*")]:
            path.chmod(path.stat().st_mode & 0o555 if on else path.stat().st_mode | 0o200)

    yield lock
    lock(False)


CHANGES = [
    (*UPDATE[:4], "a"),
    ("release", "promote", "decision-3"),
    ("eval", "run", "base@v1", "--suite", "b"),
    ("signal", "add", "--kind", "incident", "--model", "support"),
]


@pytest.mark.parametrize("command", CHANGES, ids=lambda words: " ".join(words[:2]))
def test_a_read_only_workspace(grown, locked, command):
    """Exit 5, one line, nothing changed; and only for want of permission: with it the same command works."""
    was = acme.state(grown)
    locked(True)
    done = run(grown, *command, limits=Limits(powerless=True))
    assert done.code == 5, done.err
    assert len(done.err.splitlines()) == 1 and done.err.startswith("meristem: ")
    assert "permission" in done.err
    locked(False)
    assert acme.state(grown) == was
    assert run(grown, *command, limits=Limits(powerless=True)).code == 0


@pytest.mark.parametrize(
    "command",
    [
        "log verify",
        "model list",
        "release explain decision-2",
        "eval compare support@v4 support@v2 --suite a",
        "report support --out {out}",
    ],
)
def test_a_read_only_workspace_can_be_audited(grown, locked, command, tmp_path):
    """From an auditor's read-only mount: what only reads works, and leaves nothing behind."""
    before = sorted(grown.rglob("*"))
    locked(True)
    words = command.format(out=tmp_path / "report.html").split()
    done = run(grown, *words, limits=Limits(powerless=True))
    assert done.code == 0 and done.out.strip(), done.err
    assert sorted(grown.rglob("*")) == before


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_full_disk_during_an_update(released, trained, copy, size):
    """Whatever file is the first that no longer fits: exit 5, and with space again the same weights."""
    folder = copy(released)
    done = run(folder, *UPDATE, limits=Limits(file_size=size))
    assert done.code == 5, done.err
    assert len(done.err.splitlines()) == 1 and "Traceback" not in done.err
    assert content(folder, "support@challenger") == content(folder, "support@v2")
    assert intact(folder)
    assert run(folder, *UPDATE).code == 0
    assert content(folder, "support@v3") == content(trained, "support@v4")


def test_a_full_disk_while_data_comes_in(fresh, files, tmp_path):
    was = acme.state(fresh)
    many = acme.lines(
        tmp_path / "many.jsonl", [{"prompt": f"question {n}", "completion": "yes"} for n in range(2000)]
    )
    done = run(fresh, "data", "add", "many", "--file", many, limits=Limits(file_size=60_000))
    assert done.code == 5 and len(done.err.splitlines()) == 1
    assert acme.state(fresh) == was and not acme.leftovers(fresh)


def test_the_installed_script_is_interrupted_from_outside(released, copy):
    """The real executable and a real Ctrl-C from another process, once the update is under way."""
    folder = copy(released)
    script = Path(sys.executable).parent / "meristem"
    words = [script, "--workspace", folder, *UPDATE]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    under_way = folder / ".meristem/runs/update-2.lock"
    while not under_way.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "meristem: interrupted; the same command finishes the work"
    assert "Traceback" not in err
    assert intact(folder)
