"""The closed loop: every kind of signal, retries up to the limit, approvals, and turns cut off at every stage."""

from __future__ import annotations

import inspect

import pytest
from tests import acme

import meristem as ms
from meristem import loop
from meristem.ecosystem.records import Plan
from meristem.errors import BadInput, NonFiniteLoss, StateMoved, TrainingFailed
from meristem.planning import planner
from meristem.release import decisions, rollout
from meristem.training import updates

QUICK = (
    "{max_steps: 3, batch_size: 4, learning_rate: 0.001, max_length: 64, dtype: float32, checkpoint_steps: 2}"
)
HARMLESS = "{gate: non_inferiority, suites: all, margin: 1.0}"  # passes whatever three small steps do


@pytest.fixture
def quick(fresh):
    """Short training, a gate that always passes."""
    acme.gates(fresh, HARMLESS)
    text = (fresh / "meristem.yaml").read_text()
    before, _, _ = text.partition("  recipe:")
    (fresh / "meristem.yaml").write_text(f"{before}  recipe: {QUICK}\n")
    return fresh


def open_(folder, actor="kim"):
    return ms.Workspace.open(folder, actor=actor)


def statuses(ws, kind):
    return [entry.status for entry in ws.records(kind)]


def recipe_of(ws, entry):
    return ws.store.document(entry.record.recipe)


def test_nothing_pending_is_no_turn(quick):
    ws = open_(quick)
    assert ws.turn("support") is None and ws.plan("support") is None
    ws.close()


def test_new_data_is_planned_in_full_before_training_and_released(quick):
    """Two signals of new data are answered by one plan; recipe, budget, suites and criteria stand in it."""
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"], note="first")
    ws.signal("new-data", "support", data=["b", "a"])
    plan = ws.plan("support")
    record = plan.as_(Plan)
    assert record.attempt == 1 and len(record.signals) == 2 and len(record.data) == 2
    assert [c.suite for c in record.criteria] == ["a", "b"] and set(record.suites) == {"a", "b"}
    assert record.budget == {"new_rows": 32, "epochs": 3.0, "max_steps": 3}
    assert recipe_of(ws, plan)["stage"] == "cit" and recipe_of(ws, plan)["methods"] == []
    assert statuses(ws, "signal") == ["planned", "planned"] and ws.plan("support").id == plan.id
    turn = ws.turn("support")
    assert (turn.outcome, turn.plan.id, turn.unfinished) == ("released", plan.id, False)
    assert ws.version("support") == turn.version and statuses(ws, "plan") == ["done"]
    decision = turn.decision.record
    assert decision.plan == plan.digest
    assert [(g.gate, g.suite) for g in decision.gates] == [(c.gate, c.suite) for c in record.criteria]
    ws.close()


def test_criteria_do_not_move_after_the_plan(quick):
    """A policy made laxer or stricter after planning does not change what the plan is judged by, nor by whom."""
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    plan = ws.plan("support").as_(Plan)
    ws.close()
    acme.gates(quick, "{gate: improvement, suites: all, min_gain: 1.0}")
    acme.configure(quick, approvals="1")
    ws = open_(quick)
    turn = ws.turn("support")
    assert turn.outcome == "released"
    decision = turn.decision.record
    assert [g.gate for g in decision.gates] == [c.gate for c in plan.criteria]
    assert (decision.policy, decision.approvals_needed) == (plan.policy, 0)
    assert ws.store.document(plan.policy)["gates"][0]["gate"] == "non_inferiority"
    ws.close()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("incident", "the incident signal brings no data"),
        ("regression", "the regression signal brings no data"),
        ("drift", "the drift signal brings no data"),
        ("base-upgrade", "not built yet: keep the pinned base"),
    ],
)
def test_a_signal_without_an_answer_is_closed_with_the_reason(quick, kind, told):
    """Recorded, answered with a plan that says why nothing is trained, and not asked again."""
    ws = open_(quick)
    ws.signal(kind, "support", note="see ticket 7")
    turn = ws.turn("support")
    assert turn.outcome == "waiting" and told in turn.reason and turn.version is None
    assert turn.plan.as_(Plan).action == "wait" and told in turn.plan.as_(Plan).reason
    assert statuses(ws, "plan") == ["closed"] and ws.turn("support") is None
    assert ws.records("update") == [] and ws.version("support").number == 1
    ws.close()


@pytest.mark.parametrize("kind", ["incident", "regression"])
def test_an_incident_with_data_is_answered_with_protection(quick, kind):
    ws = open_(quick)
    ws.signal(kind, "support", data=["a"], note="wrong answers")
    plan = ws.plan("support")
    assert [m["name"] for m in recipe_of(ws, plan)["methods"]] == ["experience-replay", "ewc"]
    assert "wrong answers" in plan.as_(Plan).reason and "protection" in plan.as_(Plan).reason
    assert ws.turn("support").outcome == "released"
    ws.close()


@pytest.mark.parametrize("attempts", [1, 3])
def test_at_most_n_attempts(quick, attempts):
    """Each failed gate asks for another attempt on the same data and champion, N in all, none like another."""
    acme.gates(quick, "{gate: improvement, suites: all, min_gain: 1.0}")
    acme.configure(quick, attempts=str(attempts))
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    turns = []
    while (turn := ws.turn("support")) is not None:
        turns.append(turn)
    assert [t.outcome for t in turns] == ["stopped"] * attempts
    assert [t.plan.as_(Plan).attempt for t in turns] == list(range(1, attempts + 1))
    assert len({tuple(t.plan.as_(Plan).data) for t in turns}) == 1
    assert [t.next_signal is None for t in turns] == [False] * (attempts - 1) + [True]
    assert all(t.next_signal.record.kind == "regression" for t in turns[:-1])
    recipes = [recipe_of(ws, t.plan) for t in turns]
    assert [[m["name"] for m in r["methods"]] for r in recipes[1:]] == [["experience-replay", "ewc"]] * (
        attempts - 1
    )
    assert len({t.version.digest for t in turns}) == attempts
    if attempts == 3:
        assert recipes[2]["learning_rate"] == recipes[1]["learning_rate"] / 2
    assert ws.version("support").number == 1 and "improvement on a" in turns[-1].reason
    ws.close()


def test_approvals_are_waited_for(quick):
    """The plan stays open; the next turn after the last approval promotes without training again."""
    acme.configure(quick, approvals="2")
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    turn = ws.turn("support")
    assert turn.outcome == "waiting" and turn.unfinished and "waits for approval" in turn.reason
    ws.approve(turn.decision.id, "looks good")
    ws.approve(turn.decision.id, "twice by the same person")
    again = ws.turn("support")
    assert again.outcome == "waiting" and again.decision.id == turn.decision.id
    assert statuses(ws, "plan") == ["open"] and ws.version("support").number == 1
    ws.close()
    ws = open_(quick, actor="lee")
    ws.approve(turn.decision.id)
    done = ws.turn("support")
    assert done.outcome == "released" and done.version == turn.version
    assert len(ws.records("update")) == 1 and len(ws.records("decision")) == 1
    ws.close()


def test_a_decision_promoted_by_hand_ends_its_plan(quick):
    acme.configure(quick, approvals="1")
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    turn = ws.turn("support")
    ws.approve(turn.decision.id)
    ws.promote(turn.decision.id)
    ws.rollback("support")
    done = ws.turn("support")  # released and taken back since: the loop must not release it again
    assert done.outcome == "released" and "already" in done.reason
    assert ws.version("support").number == 1 and statuses(ws, "plan") == ["done"]
    ws.close()


def test_a_champion_that_moved_is_judged_against_again(quick):
    """Somebody releases another version while the plan waits: a new decision against the new champion."""
    acme.configure(quick, approvals="1")
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    first = ws.turn("support")
    ws.approve(first.decision.id)
    other = ws.propose(ws.update("support", data=["b"]).version)
    ws.approve(other.id)
    ws.promote(other)
    with pytest.raises(StateMoved, match="moved from v1 to v3"):
        ws.promote(first.decision.id)
    second = ws.turn("support")
    assert second.outcome == "waiting" and second.decision.id != first.decision.id
    assert second.decision.record.champion == other.record.version
    ws.close()


def test_lost_weights_stop_the_plan_with_the_reason(quick, monkeypatch):
    """A loss that becomes NaN ends the plan; it names step and samples, and nothing is released."""
    from meristem.training.continual import ContinualTrainer

    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])

    def poisoned(self, value):
        raise NonFiniteLoss(float("nan"), self.state.global_step, self.sample_ids)

    monkeypatch.setattr(ContinualTrainer, "_refuse_non_finite", poisoned)
    with pytest.raises(TrainingFailed, match=r"loss is nan at step 0 \(samples: a-"):
        ws.turn("support")
    assert statuses(ws, "plan") == ["failed"] and statuses(ws, "update") == ["failed"]
    assert ws.turn("support") is None and ws.version("support").number == 1
    ws.close()


@pytest.mark.parametrize(("room", "name"), [(updates, "run"), (decisions, "propose")])
def test_what_is_refused_while_a_plan_is_carried_out_ends_it(quick, monkeypatch, room, name):
    """Left open it would be tried for ever, and no other signal of the model would be answered."""
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])

    def refuse(*_):
        raise BadInput("suite a: an item is longer than the model's context")

    with monkeypatch.context() as patched:
        patched.setattr(room, name, refuse)
        with pytest.raises(BadInput, match="longer than"):
            ws.turn("support")
    assert statuses(ws, "plan") == ["failed"] and "longer than" in list(ws.events())[-1].reason
    assert ws.turn("support") is None
    ws.signal("new-data", "support", data=["b"])
    assert ws.turn("support").outcome == "released"
    ws.close()


def test_a_plan_whose_approval_never_comes_is_closed_by_hand(quick):
    acme.configure(quick, approvals="1")
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    ws.turn("support")
    ws.signal("new-data", "support", data=["b"])
    ws.close_plan("plan-1", "nobody approves")
    assert ws.turn("support").plan.id == "plan-2" and statuses(ws, "plan") == ["closed", "open"]
    ws.close()


def test_a_plan_closed_while_it_was_carried_out_releases_nothing(quick, monkeypatch):
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    original = decisions.propose

    def closed_meanwhile(*args):
        ws.close_plan("plan-1", "stop it")
        return original(*args)

    monkeypatch.setattr(decisions, "propose", closed_meanwhile)
    with pytest.raises(StateMoved, match="plan-1 was set to closed meanwhile; decision-1 is not released"):
        ws.turn("support")
    assert ws.version("support").number == 1 and statuses(ws, "plan") == ["closed"]
    ws.close()


def test_a_failed_plan_asks_for_one_more_attempt_only_once(quick):
    """Two loops that judged the same plan: the second finds it stopped, and its signal is not written."""
    acme.gates(quick, "{gate: improvement, suites: all, min_gain: 1.0}")
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    turn = ws.turn("support")
    with pytest.raises(StateMoved, match="plan-1 is stopped by now, no longer open"):
        loop._stop(ws, turn.plan, turn.version, turn.decision)
    assert [e.record.kind for e in ws.records("signal")] == ["new-data", "regression"]
    ws.close()


class Cut(BaseException):
    """The process dies here."""


# (where, before or after it has done its work)
BOUNDARIES = [
    (planner, "record_plan", "after"),
    (updates, "open_update", "after"),
    (updates, "train", "after"),
    (updates, "_commit", "after"),
    (decisions, "_judge_all", "before"),
    (decisions, "propose", "after"),
    (rollout, "promote", "before"),
    (rollout, "promote", "after"),
    (loop, "_close", "after"),
]


@pytest.fixture(scope="module")
def uninterrupted(origin, tmp_path_factory):
    """What a turn ends with when nothing goes wrong."""
    import shutil

    folder = tmp_path_factory.mktemp("whole") / "ws"
    shutil.copytree(origin, folder)
    acme.gates(folder, HARMLESS)
    text = (folder / "meristem.yaml").read_text().partition("  recipe:")[0]
    (folder / "meristem.yaml").write_text(f"{text}  recipe: {QUICK}\n")
    ws = open_(folder)
    ws.signal("new-data", "support", data=["a"])
    ws.turn("support")
    ends = _ends(ws)
    ws.close()
    return ends


@pytest.mark.parametrize(("room", "name", "when"), BOUNDARIES, ids=lambda v: getattr(v, "__name__", v))
def test_a_turn_cut_off_at_any_stage_ends_the_same(quick, uninterrupted, monkeypatch, room, name, when):
    """Die before or after a stage, open the workspace again, run again: the same version, released once."""
    ws = open_(quick)
    ws.signal("new-data", "support", data=["a"])
    original = getattr(room, name)

    def cut(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(room, name, cut)
        with pytest.raises(Cut):
            ws.turn("support")
    ws.close()
    ws = open_(quick)
    while ws.turn("support") is not None:
        pass
    assert _ends(ws) == uninterrupted
    assert ws.verify().intact
    ws.close()


def _ends(ws):
    """All that must not depend on when the turn was cut (an evaluation's seconds may)."""
    exact = {k: [(e.status, e.digest) for e in ws.records(k)] for k in ("signal", "plan", "update")}
    decided = [e.record.document() | {"evaluations": []} for e in ws.records("decision")]
    released = [e.record.document() | {"decision": None} for e in ws.records("release")]
    pointers = [(a.name, a.version, a.revision) for a in ws.aliases("support")]
    return exact, decided, released, pointers


def test_the_loop_reads_on_one_screen():
    assert len(inspect.getsource(loop).splitlines()) <= 80
