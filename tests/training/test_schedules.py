"""Learning rates: every step's against the closed formula, in real runs, resumed ones, and from update to update."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.tiny import tiny_model
from transformers import get_scheduler

import meristem as ms
from meristem.config import Recipe, resolve_recipe
from meristem.ecosystem import aliases
from meristem.ecosystem.records import Plan
from meristem.errors import BadInput
from meristem.planning import planner
from meristem.training import cpt, schedules
from meristem.training.recipes import settled

ETA = 0.01
ROWS = [{"id": f"t{n}", "task": "law", "text": f"Section {n}. " + "abc " * n} for n in range(4)]
SETTINGS = {
    "linear": {"warmup_share": 0.25},
    "cosine": {"warmup_share": 0.25},
    "constant": {"warmup_share": 0.25},
    "wsd": {"warmup_share": 0.25, "decay_share": 0.4, "final_rate": 0.001},
    "start": {"warmup_share": 0.25, "cooldown_share": 0.4, "constant_rate": 0.004},
    "continue": {"constant_rate": 0.004},
    "anneal": {"constant_rate": 0.004, "decay_share": 0.6, "final_rate": 0.0005},
}


def recipe_of(name, **fields):
    infinite = name in ("start", "continue", "anneal")
    named = {"schedule": "infinite", "phase": name} if infinite else {"schedule": name}
    return Recipe(stage="cpt", dtype="float32", learning_rate=ETA, **{**named, **SETTINGS[name], **fields})


def formula(
    name, t, n, *, warmup_share=0.0, cooldown_share=0.0, decay_share=0.0, constant_rate=0.0, final_rate=0.0
):
    """The table of ``training.schedules``, written a second time from the papers."""
    w, k, d = (math.ceil(n * share) for share in (warmup_share, cooldown_share, decay_share))
    if t < w:
        floor = final_rate if name == "wsd" else 0.0
        return floor + (ETA - floor) * t / w
    if name == "linear":
        return ETA * (n - t) / (n - w)
    if name == "cosine":
        return ETA / 2 * (1 + math.cos(math.pi * (t - w) / (n - w)))
    if name == "wsd" and t >= n - d:
        return final_rate + (ETA - final_rate) * (1 - math.sqrt((t - (n - d)) / d))
    if name in ("constant", "wsd"):
        return ETA
    if name == "start" and t < w + k:
        return constant_rate + (ETA - constant_rate) / 2 * (1 + math.cos(math.pi * (t - w) / k))
    if name == "anneal" and t >= n - d:
        done = (t - (n - d)) / d
        return math.exp((1 - done) * math.log(constant_rate) + done * math.log(final_rate))
    return constant_rate


def job(model, output, rows=ROWS):
    given = {"folder": model, "base_folder": None, "rows": rows, "history": {}, "method_state": None}
    return given | {"output": output, "callbacks": []}


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_and_its_resumption_have_the_rates_of_the_formula(name, model, tmp_path):
    recipe = recipe_of(name, batch_size=4, max_length=16, max_steps=7, checkpoint_steps=5, weight_decay=0.1)
    trainer = cpt.build_trainer(recipe, **job(model, tmp_path))
    trainer.train()
    expected = [formula(name, t, 7, **SETTINGS[name]) for t in range(7)]
    assert rates(trainer) == pytest.approx(expected, rel=1e-12)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)  # whose weight decay is decoupled
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]} == {0.1}
    resumed = cpt.build_trainer(recipe, **job(model, tmp_path))
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-5")
    assert rates(resumed) == rates(trainer)
    again = resumed.model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in trainer.model.state_dict().items())


SHARES = st.floats(0.01, 1.0)


@given(st.integers(1, 300), SHARES, SHARES, SHARES, st.sampled_from(["wsd", "start", "continue", "anneal"]))
def test_rates_at_any_length_and_a_state_that_stops_anywhere(n, warm, first, last, name):
    fields = {"warmup_share": min(warm, 0.99), "cooldown_share": first, "decay_share": last}
    used = {key: value for key, value in fields.items() if key in SETTINGS[name]}
    settings = {**SETTINGS[name], **used}
    assume(settings.get("warmup_share", 0) + {"start": first, "wsd": last}.get(name, 0) <= 1)
    recipe = recipe_of(name, **used)
    counts = [math.ceil(n * settings.get(f"{part}_share", 0.0)) for part in ("warmup", "cooldown", "decay")]
    if sum(counts) > n:
        with pytest.raises(BadInput, match=rf"schedule {recipe.schedule} needs .* and the run has {n} steps"):
            schedules.parts(recipe, n)
        return
    found = walk(recipe, n, stop=n // 2)
    assert found == pytest.approx([formula(name, t, n, **settings) for t in range(n)], rel=1e-9, abs=1e-15)


class Bare:
    """As much of a Hugging Face trainer as makes a scheduler."""

    def __init__(self):
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=ETA)
        self.lr_scheduler, self.args = None, type("Arguments", (), {"lr_scheduler_kwargs": None})()

    def create_scheduler(self, steps, optimizer=None):
        self.lr_scheduler = get_scheduler(
            schedules.transformers_name(self.scheduled_by),
            self.optimizer,
            schedules.parts(self.scheduled_by, steps)[0],
            steps,
            self.args.lr_scheduler_kwargs,
        )
        return self.lr_scheduler


def walk(recipe, n, stop):
    """The rates of n steps, the scheduler's state saved and loaded into a new one before step ``stop``."""
    made = schedules.scheduled(Bare, recipe)
    trainer, found = made(), []
    scheduler = trainer.create_scheduler(n)
    for t in range(n):
        if t == stop:
            state, other = scheduler.state_dict(), made()
            other.optimizer.load_state_dict(trainer.optimizer.state_dict())
            trainer, scheduler = other, other.create_scheduler(n)
            scheduler.load_state_dict(state)
            other.optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        scheduler.step()
    return found


def test_an_update_begins_at_the_rate_at_which_its_parent_ended():
    starts = schedules.infinite(recipe_of("start"), 40)
    goes_on = schedules.infinite(recipe_of("continue"), 10)
    anneals = schedules.infinite(recipe_of("anneal"), 10)
    assert starts(39) == goes_on(0) == goes_on(9) == anneals(0) == 0.004
    assert anneals(10) == pytest.approx(0.0005)  # where the decay would be one step after the last


REFUSED = [
    ({"decay_share": 0.1}, "schedule linear has no decay_share; leave it out"),
    ({"schedule": "cosine", "phase": "anneal"}, "schedule cosine has no phase"),
    ({"schedule": "wsd", "constant_rate": 0.1}, "schedule wsd has no constant_rate"),
    ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, "warmup_share and decay_share are more than"),
    ({"schedule": "wsd", "final_rate": 0.1}, "final_rate is not below the rate that decays"),
    ({"schedule": "infinite", "constant_rate": 1e-4, "final_rate": 0}, "final_rate is 0, which .* never reaches"),
    ({"schedule": "infinite", "constant_rate": 1e-4, "final_rate": 1e-4}, "final_rate is not below"),
    ({"schedule": "infinite", "phase": "start", "constant_rate": 0.1}, "constant_rate is above learning_rate"),
    ({"schedule": "infinite", "warmup_share": 0.5, "cooldown_share": 0.6}, "warmup_share and cooldown_share are"),
    ({"schedule": "polynomial"}, r"recipe\.schedule: "),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_schedule_that_does_not_hold_together_is_refused_when_it_is_read(fields, message):
    with pytest.raises(BadInput, match=message) as refusal:
        resolve_recipe(fields)
    assert "\n" not in str(refusal.value)


def test_parts_that_do_not_fit_are_refused_before_the_model_is_loaded_or_else_before_the_first_step(
    model, tmp_path
):
    recipe = recipe_of("wsd", max_steps=2, warmup_share=0.4, decay_share=0.6)
    with pytest.raises(BadInput, match=r"needs 1 of warm-up and 2 of decay, .* the run has 2 steps"):
        cpt.build_trainer(recipe, **job(tmp_path / "nowhere", tmp_path))
    by_epochs = recipe.model_copy(update={"max_steps": None, "epochs": 1, "batch_size": 4, "max_length": 64})
    trainer = cpt.build_trainer(by_epochs, **job(model, tmp_path))
    with pytest.raises(BadInput, match=r"needs 1 of warm-up and 1 of decay, .* the run has 1 steps"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_older_recipes_keep_their_document():
    keys = {"cooldown_share", "constant_rate", "phase", "decay_share", "final_rate", "preference", "packing"}
    assert not keys & Recipe().document().keys()
    for name in SETTINGS:
        recipe = recipe_of(name)
        assert Recipe.from_document(recipe.document()) == recipe
        assert {*SETTINGS[name]} <= recipe.document().keys()


def test_a_slower_recipe_still_holds_together():
    assert Recipe(learning_rate=0.02).slower(0.5).learning_rate == 0.01
    for name in ("wsd", "start", "continue"):
        slower = recipe_of(name).slower(0.125)
        assert Recipe.from_document(slower.document()) == slower
        assert slower.constant_rate == recipe_of(name).constant_rate


# ---- the lineage ------------------------------------------------------------------------------------------------

INFINITE = {"max_steps": 4, "schedule": "infinite", "constant_rate": 0.004}


def release(ws, version):
    """What a decision that passed would do."""
    with ws.store.transaction("kim") as tx:
        aliases.point(tx, "support", aliases.CHAMPION, version.digest)


@pytest.fixture(scope="module")
def line(origin, tmp_path_factory):
    """v2 started, v3 went on, v4 was annealed on the data of v3 and is the champion."""
    folder = tmp_path_factory.mktemp("line") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    for data, more in (("a", {}), ("b", {}), ("b", {"phase": "anneal", "constant_rate": None})):
        made = ws.update("support", data=[data], recipe=INFINITE | more)
        release(ws, made.version)
    yield ws
    ws.close()


def recipe_behind(ws, label):
    return Recipe.from_document(ws.store.document(ws.version(label).record.recipe))


def test_the_next_update_goes_on_at_the_constant_rate_and_the_recipe_says_so(line):
    assert [recipe_behind(line, f"support@v{n}").phase for n in (2, 3, 4)] == ["start", "continue", "anneal"]
    second, third = recipe_behind(line, "support@v3"), recipe_behind(line, "support@v4")
    assert (second.constant_rate, second.warmup_share, third.constant_rate) == (0.004, 0.0, 0.004)
    assert settled(line.store, second, line.version("support@v2")) == second


def test_what_was_annealed_is_not_continued(line):
    plan = plan_of(line, ["a", "b"], INFINITE)
    assert plan.parent == line.version("support@v3").digest
    assert Recipe.from_document(line.store.document(plan.recipe)).phase == "continue"
    assert plan.criteria  # fixed for the champion, whose tasks the candidate will be judged on
    assert plan_of(line, ["a"], INFINITE | {"phase": "anneal"}).parent == line.version("support@v3").digest
    anew = plan_of(line, ["a"], INFINITE | {"phase": "start"})
    assert anew.parent == line.version("support@v4").digest
    assert plan_of(line, ["a"], {"schedule": "linear"}).parent == line.version("support@v4").digest


def plan_of(ws, data, fields):
    settings = ws.settings("support")
    recipe = resolve_recipe(settings.recipe, fields)
    digests = ws._datasets(data)
    return planner.plan_update(ws.store, "kim", settings, "support", digests, recipe).as_(Plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "infinite"}, r"recipe\.constant_rate: missing; .* holds it from update to update"),
        (INFINITE | {"phase": "continue"}, r"recipe\.phase: continue goes on .* and support@v1 has none"),
        (INFINITE | {"phase": "anneal"}, r"recipe\.phase: anneal goes on .* and support@v1 has none"),
    ],
)
def test_a_line_has_to_start(line, fields, message):
    with pytest.raises(BadInput, match=message):
        settled(line.store, resolve_recipe(fields), line.version("support@v1"))


def test_a_fresh_adapter_always_starts(line):
    """Its B = 0, so the constant rate without a warm-up would be its first; nothing of a line's phase holds for it."""
    for parent in ("support@v3", "support@v4"):
        fields = {"methods": [{"name": "per-task"}], "warmup_share": 0.5, "learning_rate": 0.01}
        anew = resolve_recipe(INFINITE | fields)
        recipe = settled(line.store, anew, line.version(parent))
        assert (recipe.phase, recipe.warmup_share, recipe.constant_rate) == ("start", 0.5, 0.004)
        assert settled(line.store, recipe, line.version(parent)) == recipe
        for phase in ("continue", "anneal"):
            asked = resolve_recipe(dict(anew), {"phase": phase})
            with pytest.raises(BadInput, match=f"{phase} goes on .* method per-task trains a fresh adapter"):
                settled(line.store, asked, line.version(parent))
    plan = plan_of(line, ["a"], INFINITE | fields)
    assert (
        plan.parent == line.version("support@v4").digest
    )  # the annealed one: its weights are not gone on with


def test_another_constant_rate_than_the_lines_is_refused(line):
    asked = resolve_recipe(INFINITE | {"constant_rate": 0.002, "learning_rate": 0.01})
    with pytest.raises(
        BadInput, match=r"0\.002 asked for, but support@v3 is continued, whose line holds 0\.004"
    ):
        settled(line.store, asked, line.version("support@v3"))
    fresh = settled(line.store, asked.model_copy(update={"phase": "start"}), line.version("support@v3"))
    assert (fresh.phase, fresh.constant_rate) == ("start", 0.002)


def test_after_a_release_the_line_goes_on_and_is_judged_against_what_was_released(line):
    made = line.update("support", data=["a"], recipe=INFINITE).version
    assert made.record.parents == [line.version("support@v3").digest]
    decision = line.propose(made).record
    assert decision.champion == line.version("support@v4").digest
    assert {gate.suite for gate in decision.gates} >= {"a", "b"}


def test_data_that_only_the_annealed_branch_learned_is_not_lost_silently(released, copy):
    ws = ms.Workspace.open(copy(released), actor="kim")
    for data, more in (("a", {"phase": "start"}), ("b", {"phase": "anneal"})):
        made = ws.update(
            "support", data=[data], recipe=INFINITE | more | {"max_steps": 2, "warmup_share": 0.0}
        )
        release(ws, made.version)
    with pytest.raises(
        BadInput, match=r"@v4 was annealed .* its data b is new in it: .* goes on from support@v3, so give b"
    ):
        plan_of(ws, ["a"], INFINITE)
    assert plan_of(ws, ["a", "b"], INFINITE).parent == ws.version("support@v3").digest
    ws.close()
