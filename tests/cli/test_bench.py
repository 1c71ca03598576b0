"""``meristem bench`` as a user types it."""

from __future__ import annotations

import json

import pytest
from tests import acme
from tests.bench import tiny_stream

from meristem.bench import protocols


@pytest.fixture
def stream(tmp_path, monkeypatch):
    monkeypatch.setitem(protocols.PROTOCOLS, "tiny-2", tiny_stream.TINY)
    return tiny_stream.data_folder(tmp_path / "data")


def words(stream, out, *more):
    sizes = ("--train", 16, "--test", 10, "--steps", 1)
    return ("bench", "run", "tiny-2", "--data", stream, "--out", out, *sizes, *more)


def test_a_run_its_plan_and_its_report(cli, stream, tmp_path):
    model, out = acme.model_folder(tmp_path / "tiny"), tmp_path / "out"
    line = words(stream, out, "--model", model, "--method", "per-task", "--json")
    plan = cli(None, *line, "--dry-run")
    assert plan.code == 0 and not out.exists()
    assert [run["cached"] for run in json.loads(plan.out)] == [False]
    done = cli(None, "--actor", "ann", *line)
    [run] = json.loads(done.out)
    assert done.code == 0 and run["name"] == "tiny-2-any-per-task-seed0" and not run["cached"]
    assert cli(out, "log", "show", "--last", 1).out.count("ann") == 1  # the folder is a workspace
    assert [run["cached"] for run in json.loads(cli(None, *line, "--dry-run").out)] == [True]
    again = cli(None, *line[:-1])
    assert again.code == 0 and "cached" in again.out
    other = cli(None, *words(stream, out, "--model", model, "--method", "per-task", "--words", 3))
    assert other.code == 2 and "made with other settings (words None, now 3" in other.err
    device = cli(None, *words(stream, out, "--model", model, "--device", "cuda"))
    assert device.code == 2 and "evaluates on cpu, --device says cuda" in device.err
    told = cli(None, "bench", "report", out, "--json")
    assert told.code == 0 and json.loads(told.out)["html"] == str(out / "report/report.html")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "magic"), "there is no method 'magic'"),
        (("--orders", "8"), "tiny-2 has no order '8'; it has 1, 2, or say all"),
        (("--seeds", "one"), "--seeds one: give whole numbers"),
        (("--data", "nowhere"), "--data nowhere: no such folder"),
        (("--task", "red=nowhere"), "nowhere: no such folder; task red needs"),
        (("--task", "green=x"), "tiny-2 has no such task"),
        (("--model", "nowhere"), "nowhere': no such folder"),
        (("--train", 99), "task red: training has 20 rows, 99 were asked for"),
        (("--recipe", "none.yaml"), "none.yaml: no such file"),
        (("--epochs", 2), "--steps and --epochs both"),
    ],
)
def test_bad_input_is_exit_2_and_one_line(cli, stream, tmp_path, more, message):
    done = cli(None, *words(stream, tmp_path / "out", *more))
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done


def test_protocols_are_listed_and_an_unknown_one_is_refused(cli, tmp_path):
    told = json.loads(cli(None, "bench", "list", "--json").out)
    assert told["long-15"]["orders"]["6"][-1] == "wic" and told["ca"]["stage"] == "ca"
    done = cli(None, "bench", "run", "mixed-5", "--out", tmp_path)
    assert (
        done.code == 2 and "there is no protocol 'mixed-5'; known are mixed-2, mixed-4, mixed-8" in done.err
    )
    empty = cli(None, "bench", "report", tmp_path)
    assert empty.code == 2 and "no results here" in empty.err
