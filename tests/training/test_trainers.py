"""Every trainer that methods attach to: hooks, scaling, ids, bf16, checkpointing, resume; or a refusal by name."""

import math
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.training.stream import weights
from tests.training.trainers import CLASSES, data, make
from transformers import TrainerCallback

from meristem.errors import Clash, NonFiniteLoss
from meristem.methods import EWC, ExperienceReplay, Method, OldTeacherDistill
from meristem.training.continual import continual

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


class HalfSquare(Method):
    """0.25 |theta|^2 as a penalty; its gradient is theta / 2."""

    name = "half-square"

    def penalty(self, params):
        return 0.25 * sum(p.square().sum() for p in params.values())


class HalfSquareLoss(Method):
    """The same number as a loss term of every micro-batch; the mean over micro-batches is itself."""

    name = "half-square-loss"

    def loss(self, step):
        return 0.25 * sum(p.square().sum() for p in step.model.parameters() if p.requires_grad)


class Spy(Method):
    name, columns = "spy", frozenset({"id", "task"})
    seen: ClassVar[list] = []

    def loss(self, step):
        assert step.hidden is not None and step.hidden.requires_grad
        prompts = step.inputs.get("prompt_ids", step.inputs.get("input_ids"))
        self.seen.append(
            (step.ids, step.tasks, [bytes(row.tolist()) for row in prompts.clamp(0, 255).byte()])
        )
        return step.hidden.square().mean()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_penalty_and_a_term_count_once_whatever_the_accumulation(kind, tmp_path):
    runs = {}
    for name, methods in (("none", []), ("both", [HalfSquare(), HalfSquareLoss()])):
        trainer = make(kind, tmp_path, methods, 8, **SGD, **FOUR, **LOGGED)
        start = weights(trainer.model)
        trainer.train()
        assert trainer.state.global_step == 1
        runs[name] = weights(trainer.model), trainer.state.log_history[0]
    (bare, plain_log), (end, log) = runs["none"], runs["both"]
    assert any(not torch.equal(bare[name], start[name]) for name in start)
    for name in start:  # two gradients theta / 2
        torch.testing.assert_close(end[name], bare[name] - 0.1 * start[name], rtol=1e-4, atol=1e-6)
    size = 0.25 * sum(p.square().sum().item() for p in dict(trainer.model.named_parameters()).values())
    before = 0.25 * sum(start[name].square().sum().item() for name, _ in trainer.model.named_parameters())
    assert log["half-square/penalty"] == pytest.approx(before, rel=1e-4) != pytest.approx(size, rel=1e-4)
    assert log["half-square-loss/loss"] == pytest.approx(before, rel=1e-4)
    assert "half-square/penalty" not in plain_log
    # the trainer's own loss in the log has the term in it; a penalty is beside it
    assert log["loss"] - plain_log["loss"] == pytest.approx(before, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_ids_and_tasks_are_those_of_the_rows_in_the_micro_batch(kind, tmp_path):
    Spy.seen = []
    given = data(kind, 4) + data(kind, 4, "B")
    make(
        kind, tmp_path, [Spy()], given, num_train_epochs=1, **{**FOUR, "gradient_accumulation_steps": 2}
    ).train()
    seen = {(i, t) for ids, tasks, _ in Spy.seen for i, t in zip(ids, tasks, strict=True)}
    assert seen == {(row["id"], row["task"]) for row in given}
    for ids, tasks, prompts in Spy.seen:
        assert len(ids) == 2
        for n, (name, task) in enumerate(zip(ids, tasks, strict=True)):
            assert _prompt(name, kind) in prompts[n] and name.startswith(task)


def _prompt(name, kind):
    task, number = name.split("-")
    text = f"{task}:{number}="
    if kind == "plain":
        return text.encode()
    from tests.tiny import tiny_tokenizer

    return bytes(tiny_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_ewc_pulls_as_its_formula_says_under_accumulation(kind, tmp_path):
    bare = make(kind, tmp_path, [], 8, **SGD, **FOUR)
    start = {name: p.detach().clone() for name, p in bare.model.named_parameters()}
    bare.train()
    without = weights(bare.model)
    fisher = {name: torch.rand_like(value) for name, value in start.items()}
    anchor = {name: torch.randn_like(value) for name, value in start.items()}
    kept = {f"{part}.{k}": v for part, of in (("fisher", fisher), ("anchor", anchor)) for k, v in of.items()}
    state = {"ewc": {"tensors": kept, "json": {"tasks": ["old"]}}}
    trainer = make(kind, tmp_path, [EWC(strength=3.0, samples=2)], 8, method_state=state, **SGD, **FOUR)
    trainer.train()
    for name, value in trainer.model.named_parameters():
        pull = 3.0 * fisher[name] * (start[name] - anchor[name])
        torch.testing.assert_close(value.detach(), without[name] - 0.1 * pull, rtol=1e-4, atol=1e-5)


def test_packed_rows_train_with_methods_that_need_no_ids_and_ewc_measures_rows_unpacked(tmp_path):
    """Four rows in one sequence: term and penalty weigh as ever; the Fisher is that of single rows."""
    ends, fishers = {}, {}
    for packing in (True, False):
        for name, methods in (("none", []), ("both", [HalfSquare(), HalfSquareLoss()])):
            trainer = make("sft", tmp_path, methods, 4, packing=packing, **SGD)
            start = weights(trainer.model)
            assert len(trainer.train_dataset) == (1 if packing else 4)
            trainer.train()
            ends[name] = weights(trainer.model)
        for name in start:
            torch.testing.assert_close(
                ends["both"][name], ends["none"][name] - 0.1 * start[name], rtol=1e-4, atol=1e-6
            )
        still = {**SGD, "learning_rate": 0.0, "history": {"A": data("sft", 4)}, "task": "B"}
        trainer = make("sft", tmp_path, [EWC(samples=4)], data("sft", 4, "B"), packing=packing, **still)
        trainer.train()
        fishers[packing] = trainer.method_state()["ewc"]["tensors"]
    torch.testing.assert_close(fishers[True], fishers[False])
    assert any(value.abs().sum() > 0 for key, value in fishers[True].items() if "fisher" in key)


APPLIES = {
    "plain": ("experience-replay", "ewc"),
    "sft": ("experience-replay", "ewc"),
    "dpo": ("experience-replay", "ewc"),
    "reward": ("experience-replay",),
    "grpo": (),
    "distillation": (),
}
BOTH = {
    "experience-replay": lambda: ExperienceReplay(ratio=0.5),
    "ewc": lambda: EWC(strength=10.0, samples=2),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_replay_and_ewc_train_in_bf16_with_gradient_checkpointing_or_are_refused_by_name(kind, tmp_path):
    for name, build in BOTH.items():
        if name not in APPLIES[kind]:
            refusal = (
                rf"^method {name} (works in stages|needs the likelihood of rows).*{CLASSES[kind][0].__name__}"
            )
            with pytest.raises(Clash, match=refusal):
                continual(CLASSES[kind][0], [build()])
    methods = [BOTH[name]() for name in APPLIES[kind]] + [Spy()]
    options = {**FOUR, **LOGGED, "max_steps": 3, "bf16": True, "gradient_checkpointing": True, "task": "B"}
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    )
    if kind != "plain":
        options["peft_config"] = lora
    Spy.seen = []
    history = {"A": data(kind, 4)}
    trainer = make(kind, tmp_path, methods, data(kind, 8, "B"), history=history, **options)
    start = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(start[k], v) for k, v in weights(trainer.model).items())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(entry["spy/loss"] > 0 for entry in logged)
    tasks = {task for _, found, _ in Spy.seen for task in found}
    assert tasks == ({"A", "B"} if "experience-replay" in APPLIES[kind] else {"B"})
    if "ewc" in APPLIES[kind]:
        assert all(entry["ewc/penalty"] >= 0 for entry in logged) and logged[-1]["ewc/penalty"] > 0
        assert trainer.method_state()["ewc"]["json"] == {"tasks": ["A", "B"]}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", CLASSES)
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(kind, tmp_path):
    """In the middle of the second epoch. GRPO and distillation generate once per optimizer step here."""

    def trainer(folder, **options):
        methods = [BOTH[name]() for name in APPLIES[kind]] + [HalfSquare(), HalfSquareLoss()]
        options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "task": "B", **FOUR}
        options |= {"history": {"A": data(kind, 4)}, "gradient_accumulation_steps": 2}
        count = 8 if kind == "distillation" else 4  # two steps an epoch
        return make(kind, tmp_path / folder, methods, data(kind, count, "B"), **options)

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", callbacks=[Stop()]).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed.state.epoch == 2
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    for name in APPLIES[kind]:
        a, b = whole.method_state()[name], resumed.method_state()[name]
        assert a["json"] == b["json"]
        torch.testing.assert_close(a["tensors"], b["tensors"], rtol=0, atol=0)


class NeedsRows(Method):
    name, needs = "needs-rows", frozenset({"likelihood"})

    def finish(self, ctx):
        self.total = sum(float(ctx.loss(batch)) for batch in ctx.batches())


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in ("plain", "sft", "dpo")])
def test_what_a_method_needs_is_refused_where_it_is_not(kind):
    with pytest.raises(Clash, match=r"needs-rows needs the likelihood of rows, and .* use SFTTrainer"):
        continual(CLASSES[kind][0], [NeedsRows()])
    with pytest.raises(Clash, match=r"distill needs next-token distributions .*, and .* use SFTTrainer"):
        continual(CLASSES[kind][0], [OldTeacherDistill()], stage="cit")


@pytest.mark.parametrize("name", ["KTOTrainer", "CPOTrainer", "ORPOTrainer", "OnlineDPOTrainer"])
def test_what_a_method_needs_is_known_of_trainers_by_their_name(name):
    class_of_ones_own = type("Mine", (type(name, (), {}),), {})
    with pytest.raises(Clash, match=r"distill needs next-token distributions .*, and Mine has"):
        continual(class_of_ones_own, [OldTeacherDistill()])


def test_a_method_that_needs_rows_is_refused_on_a_stream(tmp_path):
    stream = Dataset.from_list(data("plain", 4)).to_iterable_dataset()
    with pytest.raises(Clash, match="ewc, needs-rows needs the rows at hand"):
        make("plain", tmp_path, [EWC(), NeedsRows(), HalfSquare()], stream, max_steps=1)


def test_precomputed_reference_log_probabilities_go_with_ids(tmp_path):
    Spy.seen = []
    make("dpo", tmp_path, [Spy()], 4, precompute_ref_log_probs=True, max_steps=1, **FOUR).train()
    assert {name for ids, _, _ in Spy.seen for name in ids} == {f"A-{n}" for n in range(4)}


def test_generated_batches_that_are_used_again_keep_their_ids(tmp_path):
    Spy.seen = []
    options = {**FOUR, "gradient_accumulation_steps": 1, "num_iterations": 2, "steps_per_generation": 2}
    make("grpo", tmp_path, [Spy()], 4, max_steps=4, **options).train()
    seen = [ids for ids, _, _ in Spy.seen]
    assert len(seen) == 4 and all(seen) and seen[:2] == seen[2:]


@pytest.mark.skipif("distillation" not in CLASSES, reason="TRL has DistillationTrainer since 1.10")
def test_another_stage_can_be_named_and_prompts_are_replayed(tmp_path):
    Spy.seen = []
    options = {"stage": "cit", "history": {"A": data("distillation", 4)}, "max_steps": 2, **FOUR}
    make(
        "distillation",
        tmp_path,
        [ExperienceReplay(ratio=0.5), Spy()],
        data("distillation", 4, "B"),
        **options,
    ).train()
    assert {task for _, tasks, _ in Spy.seen for task in tasks} == {"A", "B"}
    with pytest.raises(Clash, match="ewc needs the likelihood of rows"):
        continual(CLASSES["distillation"][0], [EWC()], stage="cit")


class Poison(Spy):
    name = "poison"

    def loss(self, step):
        return step.hidden.sum() * (float("nan") if "A-2" in step.ids else 0.0)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_nan_names_its_rows_and_evaluation_has_no_terms(kind, tmp_path):
    trainer = make(
        kind,
        tmp_path,
        [Poison(), HalfSquare()],
        4,
        eval_dataset=data(kind, 4),
        num_train_epochs=1,
        **{**FOUR, "gradient_accumulation_steps": 2},
    )
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.train()
    assert "A-2" in caught.value.ids and len(caught.value.ids) == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
