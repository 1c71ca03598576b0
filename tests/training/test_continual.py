"""The seam's hooks, on a plain Trainer and on TRL's SFTTrainer."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.tiny import new_model
from tests.training.stream import plain, rows, sft, tokens, weights
from transformers import Trainer

from meristem.errors import BadInput, Clash, NonFiniteLoss
from meristem.methods import EWC, ExperienceReplay, Method, build
from meristem.training import _refusals, _tags
from meristem.training.continual import continual

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}


class HalfSquare(Method):
    name = "half-square"

    def penalty(self, params):
        return 0.25 * sum(p.square().sum() for p in params.values())


class HiddenSize(Method):
    """A term whose mean over micro-batches is the mean over the whole batch."""

    name = "hidden-size"

    def loss(self, step):
        return step.hidden.square().mean()


class MeanLoss(Trainer):
    """A trainer that leaves the scaling for accumulation to ``training_step``, like DPO's."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same, for transformers before 5.23

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


def fit(kind, folder, methods, count, accumulation, **options):
    settings = {**SGD, "per_device_train_batch_size": count // accumulation}
    settings |= {"gradient_accumulation_steps": accumulation, **options}
    if kind == "sft":
        trainer = sft(folder, methods, rows(count), **settings)
    else:
        base = MeanLoss if kind == "mean" else Trainer
        trainer = plain(folder, methods, tokens(rows(count)), trainer=base, **settings)
    start = weights(trainer.model)
    trainer.train()
    return start, weights(trainer.model), trainer


@pytest.mark.parametrize("kind", ["plain", "mean", "sft"])
def test_a_penalty_counts_once_per_optimizer_step(kind, tmp_path):
    start, end, trainer = fit(kind, tmp_path, [HalfSquare()], 4, 4)
    model = new_model()
    model.load_state_dict(start)
    batch = next(trainer.context.batches(batch_size=4))
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    (loss + 0.25 * sum(p.square().sum() for p in model.parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(end[name], start[name] - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "mean", "sft"])
def test_an_extra_loss_weighs_the_same_whatever_the_accumulation(kind, tmp_path):
    _, once, _ = fit(kind, tmp_path, [HiddenSize()], 4, 1)
    _, four, _ = fit(kind, tmp_path, [HiddenSize()], 4, 4)
    _, none, _ = fit(kind, tmp_path, [], 4, 4)
    torch.testing.assert_close(once, four, rtol=1e-4, atol=1e-6)
    assert any((once[name] - none[name]).abs().max() > 1e-4 for name in once)


@pytest.mark.parametrize("make", [plain, sft])
def test_ids_and_tasks_reach_the_method(make, tmp_path):
    class Spy(Method):
        name, columns, needs = "spy", frozenset({"id", "task"}), frozenset({"likelihood"})
        seen: ClassVar[list] = []

        def loss(self, step):
            assert not {"id", "task", *_tags.KEYS.values()} & set(step.inputs)
            assert step.hidden.requires_grad and len(step.ids) == len(step.inputs["input_ids"])
            self.seen.append((step.ids, step.tasks))
            assert torch.isfinite(step.loss_of(step.inputs))

    data = rows(3, "ä") + [{**row, "id": None} for row in rows(1, "B")]
    data = tokens(data) if make is plain else data
    Spy.seen = []
    make(tmp_path, [Spy()], data, num_train_epochs=1, per_device_train_batch_size=2).train()
    pairs = {pair for ids, tasks in Spy.seen for pair in zip(ids, tasks, strict=True)}
    assert pairs == {("ä-0", "ä"), ("ä-1", "ä"), ("ä-2", "ä"), ("row-3", "B")}


def test_missing_ids_and_tasks_are_added_and_evaluation_sees_neither(tmp_path):
    bare = [{k: v for k, v in row.items() if k not in ("id", "task")} for row in rows(4)]
    for data in (bare, Dataset.from_list(bare)):
        trainer = sft(tmp_path, [HalfSquare()], data, task="re{turns}", eval_dataset=rows(2), max_steps=1)
        assert trainer.train_dataset["id"] == ["row-0", "row-1", "row-2", "row-3"]
        assert set(trainer.train_dataset["task"]) == {"re{turns}"}
        assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("make", [plain, sft])
def test_a_nan_names_step_and_samples_and_stops_before_the_optimizer(make, tmp_path):
    class Poison(Method):
        name = "poison"

        def loss(self, step):
            return step.hidden.sum() * (float("nan") if "A-2" in step.ids else 0.0)

    data = rows(4)
    trainer = make(
        tmp_path,
        [Poison()],
        tokens(data) if make is plain else data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.train()
    assert caught.value.ids == ["A-2"] and caught.value.step == trainer.state.global_step
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_gradient_hooks_see_accumulated_unclipped_gradients_with_penalties(tmp_path):
    class Look(Method):
        name = "look"
        norms: ClassVar[list] = []

        def gradients(self, params):
            self.norms.append(torch.stack([p.grad.norm() for p in params.values()]).norm().item())
            for p in params.values():
                p.grad.mul_(0)

    Look.norms = []
    options = {"max_grad_norm": 1e-3}
    start, end, _ = fit("sft", tmp_path, [HalfSquare(), Look()], 4, 4, **options)
    assert len(Look.norms) == 1 and Look.norms[0] > 1
    torch.testing.assert_close(start, end, rtol=0, atol=0)


def test_weights_hook_gets_the_parameters_from_before_only_if_declared(tmp_path):
    class Undo(Method):
        name, needs_before = "undo", True

        def weights(self, params, before):
            for name, p in params.items():
                assert not torch.equal(p, before[name]) or name.endswith("norm.weight")
                p.copy_(before[name])

    class Peek(Method):
        name = "peek"

        def weights(self, params, before):
            assert before is None

    start, end, _ = fit("sft", tmp_path, [Undo(), Peek()], 4, 2)
    torch.testing.assert_close(start, end, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_method_like_sam_wraps_forward_and_backward(accumulation, tmp_path):
    class Sam(Method):
        name, radius = "sam", 0.05
        seen: ClassVar[list] = []

        def loss(self, step):
            self.seen.append(step.ids)

        def prepare_model(self, model, ctx):
            self.params = [p for p in model.parameters() if p.requires_grad]

        def around(self, run):
            assert all(p.grad is None for p in self.params)
            loss = run()
            norm = torch.stack([p.grad.norm() for p in self.params]).norm()
            moves = [self.radius * p.grad / norm for p in self.params]
            with torch.no_grad():
                for p, move in zip(self.params, moves, strict=True):
                    p.add_(move)
                    p.grad = None
            run()
            with torch.no_grad():
                for p, move in zip(self.params, moves, strict=True):
                    p.sub_(move)
            return loss

    Sam.seen = []
    start, end, _ = fit("mean", tmp_path, [Sam()], 4, accumulation)
    assert (
        len(Sam.seen) == 2 * accumulation and Sam.seen[0::2] == Sam.seen[1::2]
    )  # each micro-batch runs twice
    model = new_model()
    model.load_state_dict(start)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    by_id = {row["id"]: row for row in tokens(rows(4))}
    for ids in Sam.seen[0::2]:
        batch = {key: torch.tensor([by_id[i][key] for i in ids]) for key in ("input_ids", "labels")}
        gradient = _gradient(model, batch)
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(0.05 * gradient[name] / norm)
        for name, g in _gradient(moved, batch).items():
            total[name] += g / accumulation
    for name, g in total.items():
        torch.testing.assert_close(end[name], start[name] - 0.1 * g, rtol=1e-3, atol=1e-6)
    assert not torch.equal(end["model.norm.weight"], start["model.norm.weight"])


def _gradient(model, batch):
    params = dict(model.named_parameters())
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def test_the_reference_is_the_model_without_its_adapter(tmp_path):
    class Distance(Method):
        name = "distance"
        seen: ClassVar[list] = []

        def loss(self, step):
            ids = step.inputs["input_ids"]
            with torch.no_grad(), step.reference() as reference:
                old = reference(input_ids=ids).logits
            new = step.model(input_ids=ids).logits
            self.seen.append((new - old).abs().max().item())
            return (new - old).square().mean()

    Distance.seen = []
    sft(tmp_path, [Distance()], rows(4), peft_config=LoraConfig(**LORA), max_steps=2).train()
    assert Distance.seen[0] == 0 < Distance.seen[1]
    Distance.seen = []
    sft(tmp_path, [Distance()], rows(4), reference_model=new_model(9), max_steps=1).train()
    assert Distance.seen[0] > 0
    with pytest.raises(Clash, match="reference_model"):
        sft(tmp_path, [Distance()], rows(4), max_steps=1).train()


def test_values_are_logged_and_finish_runs_after_a_completed_training_only(tmp_path):
    class End(Method):
        name, needs = "end", frozenset({"likelihood"})
        runs = 0

        def finish(self, ctx):
            End.runs += 1
            assert [row["id"] for row in ctx.rows] == [row["id"] for row in rows(4)]
            assert float(ctx.loss(next(ctx.batches(batch_size=2))).detach()) > 0

    options = {"max_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    trainer = sft(tmp_path, [End(), HalfSquare(), HiddenSize()], rows(4), **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(e["half-square/penalty"] > 0 < e["hidden-size/loss"] for e in logged)
    assert End.runs == 1

    class Broken(Method):
        name = "broken"

        def gradients(self, params):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sft(tmp_path, [End(), Broken()], rows(4), max_steps=1).train()
    assert End.runs == 1


class Rebuild(Method):
    name, replaces_architecture = "rebuild", True


class RebuildToo(Method):
    name, replaces_architecture = "rebuild-too", True


class NeedsTasks(Method):
    name, columns = "needs-tasks", frozenset({"task"})


class RewardsOnly(Method):
    name, stages = "rewards-only", frozenset({"rl"})


class Twice(Method):
    name = "twice"

    def around(self, run):
        return run()


def test_methods_that_cannot_work_together_are_refused_by_name(tmp_path):
    generating = type("GRPOTrainer", (Trainer,), {})
    for base, methods, words in (
        (Trainer, [Rebuild(), RebuildToo()], "rebuild and rebuild-too"),
        (Trainer, [EWC(), EWC(strength=1)], "ewc is given twice"),
        (type("SFTTrainer", (Trainer,), {}), [RewardsOnly()], "rewards-only works in stages rl"),
        (generating, [EWC()], "ewc works in stages ca, cit, cpt, not in rl"),
        (generating, [Twice()], "twice runs a batch twice"),
    ):
        with pytest.raises(Clash, match=words):
            continual(base, methods)
    with pytest.raises(Clash, match="cit"):
        continual(Trainer, [RewardsOnly()], stage="cit")
    with pytest.raises(Clash, match="needs-tasks needs the task of each row"):
        sft(tmp_path, [NeedsTasks()], rows(4), packing=True)
    with pytest.raises(BadInput, match=r"EWC is a class: give EWC\(\)"):
        continual(Trainer, [EWC])
    with pytest.raises(BadInput, match=r"give a list, e.g. \[EWC\(\)\]"):
        continual(Trainer, EWC())
    for given, words in (({"method_state": [1]}, "what method_state"), ({"history": rows(2)}, "give a dict")):
        with pytest.raises(BadInput, match=words):
            sft(tmp_path, [EWC()], rows(4), **given)
    with pytest.raises(Clash, match="which padding_free drops: padding_free=False"):
        sft(tmp_path, [NeedsTasks()], rows(4), padding_free=True)
    with pytest.raises(BadInput, match="is not a Method"):
        continual(Trainer, ["ewc"])


def test_gradient_methods_refuse_scaled_gradients():
    args = SimpleNamespace(gradient_accumulation_steps=2)
    scaled = SimpleNamespace(accelerator=SimpleNamespace(scaler=object()), args=args)
    with pytest.raises(Clash, match="ewc works on plain gradients, this run has fp16"):
        _refusals.gradients([EWC()], scaled)
    _refusals.gradients([ExperienceReplay()], scaled)
    sharded = SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=True), args=args)
    with pytest.raises(Clash, match="twice needs the gradient of each micro-batch"):
        _refusals.gradients([Twice()], sharded)


def test_replay_needs_rows_at_hand(tmp_path):
    stream = Dataset.from_list(tokens(rows(4))).to_iterable_dataset()
    with pytest.raises(Clash, match="experience-replay needs the rows at hand"):
        plain(tmp_path, [ExperienceReplay()], stream, max_steps=1)


def test_tags_survive_encoding():
    words = ["", "a", "Größe/€"]
    assert _tags.decode(_tags.encode(words)) == words


def test_earlier_weights_are_not_put_back_under_state_that_goes_with_later_ones(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    best |= {"eval_steps": 1, "save_steps": 1, "max_steps": 2, "eval_dataset": rows(2)}
    for name in ("lae", "mer", "o-lora", "ewc", "mocl"):
        with pytest.raises(Clash, match=f"method {name} keeps state .*: load_best_model_at_end=False"):
            sft(tmp_path, [build(name)], rows(4), **best)
    sft(tmp_path, [ExperienceReplay()], rows(4), **best).train()  # whose rows go with any weights
