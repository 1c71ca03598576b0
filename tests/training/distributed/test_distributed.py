"""Two processes give what one gives with the same global batch: DDP by ``accelerate launch``, FSDP2 bare."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.distributed import worker

from meristem.methods.facts import all_facts
from meristem.training import _checkpoint

ROOT = Path(__file__).resolve().parents[3]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``(two ranks, one process, folder)``; the launched processes run beside the reference in this one."""
    folder = tmp_path_factory.mktemp("distributed")
    # --multi_gpu is the launcher of several processes, on CPUs too; use_cpu=True makes them a gloo group
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "tests.training.distributed.worker", str(folder)]
    started = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        single = {"ddp": worker.all_ddp(folder / "one", 1), "fsdp": worker.fsdp(folder / "one")}
        single["watched"] = worker.watched(folder / "one", 1)
        output, _ = started.communicate(timeout=200)
    finally:
        started.kill()
    assert started.returncode == 0, output[-6000:]
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return ranks, single, folder


def close(a, b, rtol=1e-4):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


def values(logged):
    return [{key: torch.tensor(value) for key, value in entry.items()} for entry in logged]


@pytest.mark.parametrize("kind", ["sft", "plain", "dpo", "reward"])
def test_ddp_trains_as_one_process_does(runs, kind):
    (first, second), single, _ = runs
    one, a, b = single["ddp"][kind], first["ddp"][kind], second["ddp"][kind]
    assert a["processes"] == 2 and a["wrapped"] == "DistributedDataParallel" and one["processes"] == 1
    close(a["weights"], b["weights"], rtol=0)
    close(a["weights"], one["weights"])
    assert len(one["logged"]) == 3 and all("row-term/loss" in entry for entry in one["logged"])
    close(values(a["logged"]), values(one["logged"]))
    if kind in ("sft", "plain"):
        assert one["logged"][-1]["ewc/penalty"] > 0


@pytest.mark.parametrize("kind", ["sft", "plain", "dpo", "reward"])
def test_rows_replayed_ones_too_are_dealt_out_to_the_ranks(runs, kind):
    (first, second), single, _ = runs
    one, a, b = (run["ddp"][kind]["seen"] for run in (single, first, second))
    assert len(one) == len(a) == len(b) == 6  # three steps of two micro-batches
    for whole, left, right in zip(one, a, b, strict=True):
        assert [sorted(left[n] + right[n]) for n in (0, 1)] == [sorted(whole[n]) for n in (0, 1)]
    assert {task for _, tasks in a for task in tasks} == {"A", "B"}


@pytest.mark.parametrize("kind", ["grpo", "distillation"])
def test_trainers_that_generate_keep_their_ranks_together(runs, kind):
    (first, second), _, _ = runs
    a, b = first["ddp"][kind], second["ddp"][kind]
    close(a["weights"], b["weights"], rtol=0)
    close(values(a["logged"]), values(b["logged"]))
    assert all(
        len(ids) == 2 and ids != other for (ids, _), (other, _) in zip(a["seen"], b["seen"], strict=True)
    )


def test_finish_leaves_every_rank_with_the_state_of_one_process(runs):
    ranks, single, _ = runs
    want = single["ddp"]["sft"]["state"]
    assert want["ewc"]["json"] == {"tasks": ["A", "B"]} and want["experience-replay"]["json"]["tasks"] == [
        "A",
        "B",
    ]
    for rank in ranks:
        got = rank["ddp"]["sft"]["state"]
        assert (
            got["experience-replay"] == want["experience-replay"]
            and got["ewc"]["json"] == want["ewc"]["json"]
        )
        close(got["ewc"]["tensors"], want["ewc"]["tensors"], rtol=1e-3)


def test_a_checkpoint_of_two_ranks_is_complete_and_resumes_to_the_same_bits(runs):
    ranks, _, folder = runs
    checkpoint = folder / "sft" / "checkpoint-2"
    assert _checkpoint.why_incomplete(checkpoint) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert sorted(_checkpoint.read(checkpoint)) == ["again", "around", "ewc", "experience-replay", "row-term"]
    for rank in ranks:
        close(rank["ddp"]["resumed"]["weights"], rank["ddp"]["sft"]["weights"], rtol=0)


@pytest.mark.parametrize("task", ["B", "C"])
def test_fsdp2_on_dtensors_trains_as_one_process_does_with_replay_and_ewc(runs, task):
    ranks, single, _ = runs
    one = single["fsdp"][task]
    assert one["kinds"] == {"Parameter"} and one["logged"][-1]["ewc/penalty"] > 0
    for rank in ranks:
        got = rank["fsdp"][task]
        assert got["kinds"] == {"DTensor"} and got["processes"] == 1
        close(got["weights"], one["weights"])
        close(values(got["logged"]), values(one["logged"]))
        close(got["state"]["ewc"]["tensors"], one["state"]["ewc"]["tensors"], rtol=1e-3)
        assert got["state"]["experience-replay"] == one["state"]["experience-replay"]
    assert all(
        value.abs().sum() > 0 for key, value in one["state"]["ewc"]["tensors"].items() if "fisher" in key
    )


def test_what_cannot_work_on_sharded_weights_says_so_by_name(runs):
    ranks, _, _ = runs
    for rank in ranks:
        said = rank["refused"]
        assert "make it a penalty" in said.pop("row-term")
        for name in ("save", "resume"):  # Hugging Face's trainer would write and read this rank's shards
            assert "neither write nor read checkpoints of weights sharded by fully_shard" in said.pop(name)
        assert set(said) == {name for name, found in all_facts().items() if not found.sharded}
        assert all(name in line and "\n" not in line for name, line in said.items()), said


def test_a_watched_run_is_stopped_on_both_ranks_at_the_step_of_one_process(runs):
    ranks, single, _ = runs
    one = single["watched"]
    assert one["reason"] and one["flips"] and 2 <= one["step"] < 12
    first, second = (rank["watched"] for rank in ranks)
    assert first == second and first["step"] == one["step"] and first["scores"][0] == one["scores"][0]


def test_ranks_that_see_different_answers_go_on_together_by_those_of_the_first(runs):
    first, second = (rank["apart"] for rank in runs[0])
    assert first == second and first["step"] == 12 and first["reason"] is None
    assert {line["forgetting/score"] for line in first["scores"]} == {1.0}


def test_a_watch_refuses_sharded_weights(runs):
    assert all("the weights are sharded" in rank["unwatched"] for rank in runs[0])
