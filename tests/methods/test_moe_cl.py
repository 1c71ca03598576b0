"""MoE-CL's default in training: against its equations, experts that stay, replayed rows, refusals, and the claims."""

import copy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.adapters import assert_forgets_less, assert_resumes
from tests.methods.mixtures import (
    RANK,
    SCALE,
    TARGETS,
    Gradients,
    adapted,
    double,
    expert,
    factors,
    prompts,
    stored,
)
from tests.tiny import new_model
from tests.training.stream import plain, rows, tokens
from torch.func import functional_call

from meristem.errors import BadInput
from meristem.methods.architecture import experts as runtime
from meristem.methods.architecture._base import base_digest
from meristem.methods.architecture.moe_cl import MoECL
from meristem.methods.architecture.task_experts import experts_in, shared_in
from meristem.methods.base import Method
from meristem.methods.replay.experience_replay import ExperienceReplay

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2}
SGD |= {"logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 4}
QUICK = {"max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}


def mixed():
    """Rows of tasks C and A, of other lengths, so that the batch is padded."""
    return tokens(
        [{**r, "prompt": r["prompt"] * (n + 1)} for n, r in enumerate([*rows(2, "C"), *rows(2, "A")])]
    )


def of(task, count=3):
    """Rows whose prompts have letters that no other task has."""
    return [
        {"id": f"{task}{n}", "task": task, "input_ids": [*p, 20, 2], "labels": [-100] * len(p) + [20, 2]}
        for n, p in enumerate(prompts(task, count))
    ]


def third(tmp_path, method, data=None, state=None, kind=torch.float32, **options):
    """A trainer of task C after A and B, which were stored by hand."""
    base = new_model if kind == torch.float32 else double
    options = {"model": adapted(base), "task": "C", **QUICK, **options}
    state = stored(kind=kind) if state is None else state
    return plain(tmp_path, [method], data or of("C"), method_state=state, **options)


def gates_of(trainer):
    (found,) = (p for name, p in trainer.parameters().items() if "expert_gates" in name)
    return found.detach().clone()


# ---- the equations ---------------------------------------------------------------------------------------------


def nll(parameters, row):
    """Summed over the labelled tokens of one row, and how many there are."""
    ids = {"input_ids": torch.tensor([row["input_ids"]])}
    predicted = functional_call(double(), parameters, (), ids).logits[0].log_softmax(-1)
    labelled = [at for at, label in enumerate(row["labels"]) if label != -100]
    return -sum(predicted[at - 1, row["labels"][at]] for at in labelled), len(labelled)


def test_it_trains_as_merged_weights_row_by_row_do(tmp_path):
    """Two steps of gradient descent on A_t, B_t, B_0 and theta, a batch of task C with replayed rows of A.

    Against autograd by hand in float64 of y = W x + g_s s B_0 A_0 x + g_t s B_t A_t x, and of the drift.
    """
    data, state, protect, rate, scale = mixed(), stored(), 300.0, 2.0, SCALE
    method = MoECL(adversary=0, protect=protect, start="previous", gate_rate=rate)
    trainer = third(tmp_path, method, data, copy.deepcopy(state), torch.float64, **SGD)
    trainer.train()
    old = {task: expert(task) for task in "AB"}
    shared, tensors = expert("shared", gate=None), state["moe-cl"]["tensors"]
    shares = torch.stack([torch.stack([e.gates[n] for n in TARGETS]).softmax(-1)[:, 0] for e in old.values()])
    sigma = sum(shares[at][:, None, None] ** 2 * tensors[f"statistics.{at}.moment"] for at in range(2))
    start = {name: shared.factors[name][1] for name in TARGETS}
    sizes = torch.stack([(start[n] @ sigma[at] @ start[n].T).trace() for at, n in enumerate(TARGETS)])
    base = {name: p.detach() for name, p in double().named_parameters()}
    downs = [old["B"].factors[name][0].clone() for name in TARGETS]
    ups = [old["B"].factors[name][1].clone() for name in TARGETS]
    commons = [start[name].clone() for name in TARGETS]
    logits = torch.stack([old["B"].gates[name] for name in TARGETS]) / rate
    for step in range(2):
        leaves = [p.requires_grad_() for p in (*downs, *ups, *commons, logits)]
        total, count = 0, 0
        for row in data:
            whole = dict(base)
            for at, name in enumerate(TARGETS):
                own, theta = (downs[at], ups[at]), rate * logits[at]
                if row["task"] == "A":
                    own, theta = old["A"].factors[name], old["A"].gates[name]
                g_s, g_t = theta.exp() / theta.exp().sum()
                common = g_s * scale * commons[at] @ shared.factors[name][0]
                whole[f"{name}.weight"] = base[f"{name}.weight"] + common + g_t * scale * own[1] @ own[0]
            value, labelled = nll(whole, row)
            total, count = total + value, count + labelled
        moved = [commons[at] - start[name] for at, name in enumerate(TARGETS)]
        drifts = torch.stack([(m @ sigma[at] @ m.T).trace() for at, m in enumerate(moved)])
        penalty = protect * (drifts / (sizes + sizes.mean() / 100)).mean()
        log = trainer.state.log_history[step]
        assert log["loss"] == pytest.approx(float(total / count), abs=1e-5)
        assert log["moe-cl/penalty"] == pytest.approx(float(penalty), rel=1e-5, abs=1e-12)
        assert (float(penalty) > 1e-3) is bool(step)
        gradients = torch.autograd.grad(total / count + penalty, leaves)
        new = [(p - 0.5 * g).detach() for p, g in zip(leaves, gradients, strict=True)]
        downs, ups, commons, logits = new[:4], new[4:8], new[8:12], new[12]
    for at, (name, (down, up)) in enumerate(factors(trainer.model).items()):
        assert name == TARGETS[at]
        assert torch.equal(down[:RANK], shared.factors[name][0])
        for ours, reference in (
            (down[RANK:], downs[at]),
            (up[:, RANK:], ups[at]),
            (up[:, :RANK], commons[at]),
        ):
            torch.testing.assert_close(ours.detach(), reference, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gates_of(trainer), logits, rtol=1e-5, atol=1e-8)
    kept = trainer.method_state()["moe-cl"]["tensors"]
    torch.testing.assert_close(kept["gates.2"], rate * logits, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(kept[f"experts.2.{TARGETS[1]}.lora_B.weight"], ups[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(kept[f"shared.{TARGETS[1]}.lora_B.weight"], commons[1], rtol=1e-5, atol=1e-8)


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    ends = []
    for batch, parts in ((4, 1), (2, 2)):
        options = {**SGD, "per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        trainer = third(tmp_path, MoECL(adversary=0), mixed(), None, torch.float64, **options)
        trainer.train()
        ends.append({n: p.detach().clone() for n, p in trainer.parameters().items()})
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gate", ["static", "token"])
def test_gradient_checkpointing_gives_the_same_gradients(gate, tmp_path):
    """With the game, the drift, and rows of an old task in the batch."""
    ends = []
    for checkpointing in (False, True):
        state, options = stored(gate=gate), {**SGD, "gradient_checkpointing": checkpointing}
        trainer = third(tmp_path, MoECL(gate=gate), mixed(), state, torch.float64, **options)
        trainer.train()
        ends.append({n: p.detach().clone() for n, p in trainer.parameters().items()})
        assert trainer.state.log_history[1]["moe-cl/loss"] > 0
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


class Watch(Method):
    """Keeps how each row of a training batch was routed."""

    name = "watch"
    columns = frozenset({"task"})

    def __init__(self):
        self.found = []

    def loss(self, step):
        weights = runtime.of(step.model).routing.weights.tolist()
        self.found += zip(step.tasks, map(tuple, weights), strict=True)


def test_replayed_rows_go_through_their_own_expert_and_train_the_shared_one_alone(tmp_path):
    watch = Watch()
    options = {
        "model": adapted(new_model),
        "task": "C",
        "history": {"A": of("A", 6)},
        **QUICK,
        "max_steps": 2,
    }
    methods = [MoECL(), ExperienceReplay(ratio=0.5), watch]
    trainer = plain(tmp_path, methods, of("C", 6), method_state=stored(kind=torch.float32), **options)
    game = methods[0].adversary
    played, learn = [], game.learn

    def counted(codes):
        played.append(codes.shape[1])
        learn(codes)

    game.learn = counted
    trainer.train()
    assert set(watch.found) == {("A", (1.0, 0.0, 0.0)), ("C", (0.0, 0.0, 1.0))}
    assert sum(played) == [task for task, _ in watch.found].count("C") < len(watch.found)
    catch = Gradients()
    methods = [MoECL(start="previous", protect=0), catch]
    options = {"model": adapted(new_model), "task": "C", **QUICK}
    plain(tmp_path, methods, of("A"), method_state=stored(kind=torch.float32), **options).train()
    for name, gradient in catch.found.items():
        common = gradient[:, :RANK].any() if "lora_B" in name else False
        rest = gradient[:, RANK:] if "lora_B" in name else gradient
        assert common == ("lora_B" in name) and not rest.any(), name


# ---- what is learned and what stays ----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["static", "token"])
def test_ten_later_tasks_leave_what_was_learned_to_the_bit_and_each_adds_the_same(gate, tmp_path):
    """Under weight decay; what a task adds to a version is one expert and one gate per layer, and its prototype."""
    state, grown, prefixes = (
        stored("A", gate=gate, kind=torch.float32),
        [],
        ("experts.", "gates.", "vectors."),
    )
    prefixes += ("residuals.", "statistics.")
    for task in "BCDEFGHIJK":
        method = MoECL(gate=gate, depth=1)
        options = {"weight_decay": 0.3, "model": adapted(new_model), "task": task, **QUICK}
        trainer = plain(tmp_path, [method], of(task), method_state=state, **options)
        trainer.train()
        before, state = state["moe-cl"]["tensors"], trainer.method_state()
        after = state["moe-cl"]["tensors"]
        for name, value in before.items():
            assert name.startswith((*prefixes, "shared.")) and after[name].dtype == value.dtype
            same = torch.equal(after[name], value)
            assert same is not (name.startswith("shared.") and "lora_B" in name), name
        trainer.save_model(str(tmp_path / "version"))
        tensors = load_file(tmp_path / "version/experts.safetensors")
        names = [name for name in tensors if not name.startswith(("vectors.", "residuals."))]
        grown.append(sum(tensors[name].numel() for name in names))
        if task == "B":
            numbers = {name: tensors[name].numel() for name in names if ".1" in name[:10]}
    width = 16
    experts, gates = len(TARGETS) * RANK * 2 * width, len(TARGETS) * 2 * (width if gate == "token" else 1)
    assert {b - a for a, b in pairwise(grown)} == {experts + gates} == {sum(numbers.values())}
    assert [e["task"] for e in state["moe-cl"]["json"]["experts"]] == list("ABCDEFGHIJK")


def test_the_shared_input_stays_or_is_learned_as_told(tmp_path):
    """Weight decay and momentum do not move A_0; without the freeze it learns."""
    start = expert("shared", gate=None, kind=torch.float32)
    for freeze in (True, False):
        options = {"weight_decay": 0.5, "learning_rate": 0.1, "max_steps": 3}
        trainer = third(tmp_path, MoECL(freeze_shared_input=freeze), **options)
        trainer.train()
        for name, (down, up) in factors(trainer.model).items():
            assert torch.equal(down[:RANK], start.factors[name][0]) is freeze
            assert not torch.equal(up[:, :RANK], start.factors[name][1])


@pytest.mark.parametrize(("start", "taken"), [("fresh", None), ("previous", "B"), ("nearest", "A")])
def test_a_new_expert_starts_as_told(start, taken, tmp_path):
    """The rows of task C have A's letters; factors and gates are those of the one it starts from, or drawn."""
    trainer = third(tmp_path, MoECL(start=start), [{**row, "task": "C"} for row in of("A", 9)])
    shared = expert("shared", gate=None, kind=torch.float32)
    found = factors(trainer.model)
    for name, (down, up) in found.items():
        first, second = shared.factors[name]
        assert torch.equal(down[:RANK], first) and torch.equal(up[:, :RANK], second)
        if taken is None:
            assert not up[:, RANK:].any() and 0.05 < down[RANK:].std() < 0.5
        else:
            own = expert(taken, kind=torch.float32).factors[name]
            assert torch.equal(down[RANK:], own[0]) and torch.equal(up[:, RANK:], own[1])
    wanted = torch.zeros(4, 2)
    if taken is not None:
        gates = expert(taken, kind=torch.float32).gates
        wanted = torch.stack([gates[name] for name in TARGETS]) / 100
    torch.testing.assert_close(gates_of(trainer), wanted)


def test_without_task_experts_or_without_the_shared_one(tmp_path):
    """The ablations: what is closed adds nothing, learns nothing, and a later task can be learned beside it."""
    for gate, silent in (("shared-only", "experts.1"), ("task-only", "shared")):
        state, method = None, None
        for task in "AB":
            method = MoECL(gate=gate, start="fresh")
            options = {"model": adapted(new_model), "task": task, **QUICK, "max_steps": 2}
            trainer = plain(tmp_path, [method], of(task), method_state=state, **options)
            trainer.train()
            state = trainer.method_state()
        tensors = state["moe-cl"]["tensors"]
        ups = {name: value for name, value in tensors.items() if "lora_B" in name}
        for name, value in ups.items():
            closed = name.startswith((silent, "experts.") if gate == "shared-only" else silent)
            assert value.isfinite().all() and bool(value.any()) is not closed, name
        wanted = [1.0, 0.0] if gate == "shared-only" else [0.0, 1.0]
        assert tensors["gates.1"].softmax(-1).tolist() == [wanted] * len(TARGETS)


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(tmp_path):
    (state,) = assert_resumes(lambda: [MoECL()], tmp_path).values()
    assert [e["task"] for e in state["json"]["experts"]] == ["A", "B"] and "gates.1" in state["tensors"]


@pytest.mark.parametrize("arguments", [{}])
def test_it_forgets_less_than_one_lora_trained_on(arguments, tmp_path):
    assert_forgets_less(lambda: [MoECL(**arguments)], tmp_path, rank=4, first=True, named=True)


# ---- refusals --------------------------------------------------------------------------------------------------


def without(prefix):
    state = stored(kind=torch.float32)
    tensors = {n: v for n, v in state["moe-cl"]["tensors"].items() if not n.startswith(prefix)}
    return {"moe-cl": {"tensors": tensors, "json": state["moe-cl"]["json"]}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task": "A"}, "an expert of task 'A' already .*: give the new rows another task name"),
        ({"task": "new+B"}, "an expert of task 'B' already .*: give the new rows another task name"),
        (
            {"model": {"r": 3}},
            "rank 3, alpha 6 do not go with the stored experts, .* rank 2, alpha 6: give the LoRA theirs",
        ),
        ({"method": {"gate_sum": 1.0}}, "gate_sum=1 does not go .* sum to 2: give gate_sum=2"),
        ({"model": {"lora_alpha": 8}}, "rank 2, alpha 8 do not go .* rank 2, alpha 6: give the LoRA theirs"),
        (
            {"model": {"target_modules": ["q_proj"]}},
            "v_proj has an expert only here or only in the stored set: adapt the same layers",
        ),
        ({"state": "vectors.1"}, "no prototype of task 'B' came with its expert: give the method_state"),
        (
            {"state": "residuals.0"},
            "the expert of task 'A' has no prototype, .*: train the task again, or take",
        ),
        (
            {"state": "statistics.1"},
            "no statistics of task 'B' came with its expert, .*: give the method_state",
        ),
        (
            {"method": {"gate": "token"}},
            "gate='token' does not go with .* of task 'A' has, static gates: give gate=static",
        ),
    ],
)
def test_what_does_not_go_with_the_stored_experts_is_refused(given, says, tmp_path):
    given = dict(given)
    options = {"model": adapted(new_model, **given.pop("model", {}))}
    options |= {"state": without(given.pop("state"))} if "state" in given else {}
    with pytest.raises(BadInput, match=f"{says}") as found:
        third(tmp_path, MoECL(**{"start": "previous", **given.pop("method", {})}), **options, **given)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gates.1", lambda t: t[:-1], r"the gates of task 'B' are \(3, 2\) for 4 layers"),
        ("gates.1", lambda t: t[:, [0, 1, 1]], r"task 'B': the gate of .*q_proj is \(3,\), not \(2,\)"),
        ("gates.1", lambda t: t * torch.nan, "task 'B': the gate of .* holds a number that is not finite"),
        ("vectors.0", lambda t: t[0], r"task 'A': its vector is \(\), not one row"),
        ("residuals.0", lambda t: t[:, 1:], r"task 'A': its prototype's residuals are \(.*\) beside a mean"),
        ("residuals.0", lambda t: t * torch.inf, "task 'A': its prototype holds a number that is not finite"),
        (f"shared.{TARGETS[0]}.lora_A.weight", lambda t: t.to(torch.int8), "A of .* holds torch.int8"),
        (f"experts.0.{TARGETS[0]}.lora_B.weight", lambda t: t[1:], r"A and B of .*q_proj are"),
    ],
)
def test_a_strangers_numbers_are_refused_before_they_answer(name, change, says):
    state = stored(kind=torch.float32)["moe-cl"]
    state["tensors"][name] = change(state["tensors"][name])
    with pytest.raises(BadInput, match=says):
        runtime.Experts(new_model(), MoECL(depth=2).router(), experts_in(state), shared=shared_in(state))


def test_experts_of_another_base_or_depth_are_refused_and_another_precision_is_not(tmp_path):
    """One weight of the base changed; the same base in bfloat16 goes on."""
    options = {"task": "A", **QUICK}
    model = adapted(lambda: new_model().bfloat16().float())
    trainer = plain(tmp_path, [MoECL()], of("A"), model=model, **options)
    trainer.train()
    state = trainer.method_state()
    assert state["moe-cl"]["json"]["base"] == base_digest(new_model().bfloat16())
    changed = new_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    says = "the experts of A were trained on another base .*: use that base, or begin anew"
    with pytest.raises(BadInput, match=says):
        third(tmp_path, MoECL(), of("B"), state, model=adapted(lambda: changed), task="B")
    says = "depth=1, and the prototypes of A were made at depth 2: give depth=2"
    with pytest.raises(BadInput, match=says):
        third(tmp_path, MoECL(depth=1), of("B"), state, task="B")
    for base in (lambda: new_model().bfloat16(), new_model):
        third(tmp_path, MoECL(), of("B"), state, model=adapted(base), task="B").train()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gate": "soft"}, "gate='soft' must be static, token, shared-only or task-only"),
        ({"start": "last"}, "start='last' must be fresh, previous or nearest"),
        ({"routing": "mean"}, "routing='mean' must be top-1 or softmax"),
        ({"unknown": 0}, "unknown=0 must be a share of a task's prompts, above 0"),
        ({"unknown": True}, "unknown=True must be a share of a task's prompts, above 0"),
        ({"adversary": -1}, "adversary=-1 must be a finite number, 0 or more"),
        ({"protect": float("nan")}, "protect=nan must be a finite number, 0 or more"),
        ({"protect": True}, "protect=True must be a finite number, 0 or more"),
        ({"freeze_shared_input": "no"}, "freeze_shared_input='no' must be true or false"),
        ({"temperature": 0}, "temperature=0 must be a finite number, 1e-09 or more"),
        ({"discriminator_rate": float("inf")}, "discriminator_rate=inf must be a finite number"),
        ({"gate_rate": "fast"}, "gate_rate='fast' must be a finite number"),
        ({"discriminator_steps": 0}, "discriminator_steps=0 must be a whole number, 1 or more"),
        ({"statistics": 2.5}, "statistics=2.5 must be a whole number, 1 or more"),
        ({"depth": -1}, "depth=-1 must be a whole number, 0 or more"),
        ({"samples": 0}, "samples=0 must be a whole number of rows, 1 or more"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, says):
    with pytest.raises(BadInput, match=f"^moe-cl: {says}") as found:
        MoECL(**arguments)
    assert "\n" not in str(found.value)
