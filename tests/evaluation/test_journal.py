"""An evaluation that is interrupted goes on where it was and gives the same bytes."""

from __future__ import annotations

import fcntl
import json
import resource
import subprocess
import sys

import pytest
from tests.evaluation.tasks.conftest import task_of

from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.errors import EnvironmentFailure
from meristem.evaluation.journal import journal_at
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite


class Killed(BaseException):
    """Not an error that anything would handle."""


@pytest.fixture(scope="module")
def engine():
    from tests.engine.conftest import make_model, make_tokenizer

    return wrap(make_model(), make_tokenizer(), EngineSettings(dtype="float32", batch_tokens=96))


@pytest.fixture(scope="module")
def suite():
    """Every pass that keeps batches: options, unconditional ones, greedy and sampled texts."""
    choices = [{"prompt": f"q{at}" * (at + 1), "answer": "a", "options": ["a", "bc"]} for at in range(6)]
    texts = [{"prompt": f"q{at}", "answer": "a"} for at in range(6)]
    pairs = [{"prompt": f"q{at}", "chosen": "ab", "rejected": "c"} for at in range(4)]
    tasks = [
        task_of("choice", choices, scoring="unconditional"),
        task_of("generate", texts, max_new_tokens=6),
        task_of("generate", texts, max_new_tokens=6, samples=2, temperature=1.0),
        task_of("preference", pairs),
    ]
    named = (
        type(task)(f"t{at}", task.type, task.settings, "general", task.items) for at, task in enumerate(tasks)
    )
    return Suite("s", tuple(named))


@pytest.fixture(scope="module")
def whole(engine, suite):
    """The results of an evaluation that nobody disturbs, and how often it reports."""
    calls = []
    rows = evaluate(engine, suite, lambda *call: calls.append(call))
    return json.dumps(rows), len(calls)


def interrupted(engine, suite, path, after):
    """Run until progress has been told of ``after`` batches."""
    left = [after]

    def count(done, total):
        left[0] -= 1
        if not left[0]:
            raise Killed

    with pytest.raises(Killed), journal_at(path) as journal:
        evaluate(engine, suite, count, journal)


def resumed(engine, suite, path):
    """The results, and how many batches the journal already held."""
    with journal_at(path) as journal:
        held = len(journal.known)
        return json.dumps(evaluate(engine, suite, journal=journal)), held


def test_resumed_after_any_batch(engine, suite, whole, tmp_path):
    rows, batches = whole
    assert batches > 8
    for after in range(1, batches, 3):
        path = tmp_path / f"{after}.jsonl"
        interrupted(engine, suite, path, after)
        again, held = resumed(engine, suite, path)
        assert again == rows
        assert held >= after
        assert not path.exists()  # the results take its place


def test_held_batches_are_not_computed_again(engine, suite, whole, tmp_path):
    path = tmp_path / "j"
    interrupted(engine, suite, path, whole[1])  # after the last batch of all
    hook = engine.model.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert resumed(engine, suite, path)[0] == whole[0]
    hook.remove()


def test_interrupted_twice(engine, suite, whole, tmp_path):
    path = tmp_path / "j"
    interrupted(engine, suite, path, 2)
    interrupted(engine, suite, path, 6)
    assert resumed(engine, suite, path)[0] == whole[0]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_torn_by_a_kill_is_computed_again(engine, suite, whole, tmp_path, cut):
    path = tmp_path / "j"
    interrupted(engine, suite, path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes()[:-cut])
    again, held = resumed(engine, suite, path)
    assert again == whole[0]
    assert held == len(lines) - 1


@pytest.mark.parametrize("damage", [b"x", b"\xff", b"\n"])
def test_what_follows_a_damaged_line_is_computed_again(engine, suite, whole, tmp_path, damage):
    path = tmp_path / "j"
    interrupted(engine, suite, path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:12] + damage + lines[2][13:]
    path.write_bytes(b"".join(lines))
    again, held = resumed(engine, suite, path)
    assert again == whole[0]
    assert held == 2


def test_a_file_that_is_no_journal_is_not_believed(engine, suite, whole, tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b"\x00\x01 something else\n" * 3)
    assert resumed(engine, suite, path) == (whole[0], 0)


def test_what_was_appended_after_damage_is_read(tmp_path):
    path = tmp_path / "j"
    with pytest.raises(Killed), journal_at(path) as journal:
        journal.part("a").put(0, [[0.1, True]])
        raise Killed
    path.write_bytes(path.read_bytes() + b"torn")
    with pytest.raises(Killed), journal_at(path) as journal:
        journal.part("a").put(1, [None])
        raise Killed
    with journal_at(path) as journal:
        assert journal.part("a").get(0) == [[0.1, True]]
        assert journal.part("a").get(1) == [None]
        assert journal.part("b").get(0) is None


def test_a_second_process_computes_by_itself(engine, suite, whole, tmp_path):
    path = tmp_path / "j"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with journal_at(path) as journal:
            journal.part("a").put(9, [1])  # kept nowhere
            assert journal.part("a").get(9) is None
            assert json.dumps(evaluate(engine, suite, journal=journal)) == whole[0]
        assert path.exists()  # it is the other's
        other.communicate()
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_is_the_environments_fault_and_what_was_kept_is_read(tmp_path):
    path = tmp_path / "j"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(EnvironmentFailure, match="file-size limit"), journal_at(path) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
            for batch in range(100):
                journal.part("a").put(batch, [batch])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.stat().st_size == 1000
    with journal_at(path) as journal:
        assert 10 < len(journal.known) < 100
        assert all(values == [batch] for (_, batch), values in journal.known.items())


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure), journal_at(tmp_path / "file" / "j"):
        pass
