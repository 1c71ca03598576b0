"""Whole runs on the tiny model: what they record, that nothing is trained twice, and going on after a stop."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.bench import tiny_stream

import meristem as ms
from meristem.bench import session
from meristem.errors import BadInput, Interrupted
from meristem.training import updates


def names(found):
    return [run.name for run, _, _ in found]


def test_a_run_records_what_decides_it_and_what_came_out(done):
    out, _, found = done
    assert [cached for _, _, cached in found] == [False] * 3
    sequential, replay, alone = (result for _, result, _ in found)
    assert sequential["tasks"] == ["red", "blue"] and len(sequential["baseline"]) == 2
    first, last = sequential["scores"]
    assert sequential["acc"] == pytest.approx(sum(last) / 2)
    assert sequential["bwt"] == pytest.approx(last[0] - first[0])
    assert [update["tasks"] for update in sequential["updates"]] == [["red"], ["blue"]]
    assert all(u["steps"] == 4 and u["tokens"] > 0 and u["seconds"] > 0 for u in sequential["updates"])
    settings = replay["settings"]
    assert settings["recipe"]["methods"][0]["arguments"]["ratio"] == 0.5
    assert settings["model"]["content"].startswith("sha256:") and "torch" in settings["code"]
    assert settings["data"]["red"]["train_rows"] == 16 and settings["engine"]["dtype"] == "float32"
    assert replay["updates"][0]["content"] == sequential["updates"][0]["content"]  # nothing to replay yet
    assert replay["updates"][1]["content"] != sequential["updates"][1]["content"]
    # a task trained alone from the start is what the sequence learns first
    assert alone["single"][0] == first[0] == alone["scores"][0][0]
    assert alone["scores"][0][1] is None and alone["acc"] == pytest.approx(sum(alone["single"]) / 2)
    files = sorted(path.name for path in (out / "results").iterdir())
    assert files == sorted(f"{name}.json" for name in names(found))


def test_only_what_the_matrix_needs_is_measured(done):
    """Untrained: 2 cells, shared by all; sequential and replay: 2 x 2 each, but the same first version; alone: 2."""
    ws = ms.Workspace.open(done[0])
    assert len(ws.evaluations()) == 2 + 4 + 2 + 1
    assert len(ws.records("update")) == 6
    ws.close()


def test_the_same_again_trains_and_measures_nothing(done, run_bench, monkeypatch):
    out, request, first = done
    for what in ("run", "open_update"):
        monkeypatch.setattr(updates, what, lambda *a, **k: pytest.fail("something was trained again"))
    again = run_bench(request, out)
    assert [cached for _, _, cached in again] == [True] * 3
    assert [result for _, result, _ in again] == [result for _, result, _ in first]


def test_other_settings_are_refused_before_anything_is_trained(done, request_for, run_bench, monkeypatch):
    monkeypatch.setattr(updates, "run", lambda *a, **k: pytest.fail("something was trained"))
    other = request_for("tiny-2", "joint", "sequential", steps=3)  # joint is new, sequential is not
    with pytest.raises(BadInput, match=r"tiny-2-1-sequential-seed0.json: .*recipe.max_steps 4, now 3"):
        run_bench(other, done[0])


def test_stopped_in_the_second_task_it_goes_on_and_comes_out_the_same(
    done, request_for, run_bench, tmp_path, monkeypatch
):
    from meristem.training.reporting import ProgressCallback

    request = request_for("tiny-2", "sequential")
    original, steps = ProgressCallback.on_step_end, []

    def asked(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        self._interruption.requested |= len(steps) == 4 + 2
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressCallback, "on_step_end", asked)
        with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
            run_bench(request, tmp_path)
        assert not (tmp_path / "results").exists()
        [(_, result, cached)] = run_bench(request, tmp_path)
    assert (
        len(steps) == 4 + 4 and not cached
    )  # neither the first task nor the first steps of the second again
    whole = done[2][0][1]
    same = ("scores", "baseline", "acc", "settings", "digest")
    assert {key: result[key] for key in same} == {key: whole[key] for key in same}
    assert [u["content"] for u in result["updates"]] == [u["content"] for u in whole["updates"]]


def test_another_seed_shares_the_untrained_model_and_the_data(done, request_for, run_bench, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done[0], out)
    request = request_for("tiny-2", "joint", seeds=("1",), steps=1)
    [(run, result, _)] = run_bench(request, out)
    assert run.name == "tiny-2-any-joint-seed1" and result["baseline"] == done[2][0][1]["baseline"]
    assert result["updates"][0]["steps"] == 2  # the steps of both tasks
    assert result["updates"][0]["tasks"] == ["red", "blue"] and result["scores"][0] == [None, None]


@pytest.mark.parametrize(("name", "stage"), [("tiny-text", "cpt"), ("tiny-pairs", "ca")])
def test_streams_of_text_and_of_preferences(name, stage, request_for, run_bench, tmp_path):
    """Continual pre-training is scored in bits per byte, alignment by the share of pairs preferred rightly."""
    [(_, result, _)] = run_bench(request_for(name, "sequential"), tmp_path)
    [before], [[after]] = result["baseline"], result["scores"]
    assert result["settings"]["recipe"]["stage"] == stage and result["bwt"] is None
    if stage == "cpt":
        assert before < after < 0  # minus bits per byte
    else:
        assert 0 <= before <= after <= 1
    ws = ms.Workspace.open(tmp_path)
    version = ws.version(result["updates"][0]["version"])
    tensors = ws.store.document(version.content)["tensors"]
    assert tensors and not any("ref" in tensor for tensor in tensors)
    ws.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "tiny"}, "there is no protocol 'tiny'"),
        ({"orders": ("9",)}, "tiny-2 has no order '9'"),
        ({"seeds": ("0", "x")}, "--seeds x: give whole numbers"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"tasks": ("red",)}, "--task red: write NAME=FOLDER or NAME=hf:"),
        ({"device": "tpu"}, "a device is cpu, cuda"),
        ({"steps": 3, "epochs": 1.0}, "--steps and --epochs both say how long"),
        ({"methods": ("magic",)}, "there is no method 'magic'"),
        ({"epochs": 0.0}, "recipe.epochs"),
    ],
)
def test_bad_requests_are_refused_at_once(request_for, change, message):
    fields = {"protocol": "tiny-2", "methods": ("sequential",), **change}
    protocol, methods = fields.pop("protocol"), fields.pop("methods")
    with pytest.raises(BadInput, match=message):
        session.check(request_for(protocol, *methods, **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: cpt\n", "stage cpt; tiny-2 is of stage cit"),
        ("methods: [{name: ewc}]\n", "a benchmark's methods are given with --method"),
        ("learning_rat: 1\n", "learning_rat: unknown key"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(request_for, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(BadInput, match=message):
        session.check(request_for("tiny-2", "sequential", recipe=recipe))


def test_a_recipe_file_and_epochs_override_the_protocols(request_for, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"learning_rate": 0.5}))
    checked = session.check(request_for("tiny-2", "sequential", recipe=recipe, epochs=2.0, words=0))
    assert checked.overrides == {"learning_rate": 0.5, "epochs": 2.0, "max_steps": None}
    assert checked.sizes.words is None and checked.protocol is tiny_stream.TINY
