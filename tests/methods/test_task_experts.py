"""Per-task experts: against merged weights row by row, frozen to the bit, routed without a task id, and the claims."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.adapters import assert_forgets_less, assert_resumes
from tests.tiny import new_model, tiny_model, tiny_tokenizer
from tests.training.stream import QUIET, plain, rows, sft, tokens
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from meristem.engine.load import load
from meristem.errors import BadInput, Clash
from meristem.experts_format import ExpertEntry, RouterEntry
from meristem.methods import Context, build
from meristem.methods.architecture.experts import Expert, Experts
from meristem.methods.architecture.mocl import MoCL
from meristem.methods.architecture.o_lora import OLoRA
from meristem.methods.architecture.param_isolation import ParamIsolation
from meristem.methods.architecture.task_experts import state_of
from meristem.methods.base import Method
from meristem.methods.regularization.old_teacher_distill import OldTeacherDistill
from meristem.training.continual import continual

Q, V, DOWN = (f"model.layers.{n}" for n in ("0.self_attn.q_proj", "1.self_attn.v_proj", "0.mlp.down_proj"))
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def double():
    return new_model().double()


def adapted(base=double, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(base(), LoraConfig(**{**LORA, **options}))


def expert(task, seed, layers, rank=2, alpha=4, kind=torch.float64):
    draw, modules = torch.Generator().manual_seed(seed), dict(new_model().named_modules())
    factors = {}
    for name in layers:
        d_out, d_in = modules[name].weight.shape
        factors[name] = tuple(
            0.5 * torch.randn(shape, generator=draw, dtype=torch.float64).to(kind)
            for shape in ((rank, d_in), (d_out, rank))
        )
    about = ExpertEntry(task=task, rank=rank, alpha=alpha, targets=list(layers))
    return Expert(about, factors, torch.randn(16, generator=draw, dtype=torch.float64).to(kind))


def two():
    """Of different rank, scale and layers."""
    return [expert("A", 1, [Q, V]), expert("B", 2, [Q, DOWN], rank=3, alpha=1)]


def mixed():
    """Rows of other lengths, so that the batch is padded."""
    return tokens(
        [{**r, "prompt": r["prompt"] * (n + 1)} for n, r in enumerate([*rows(2, "C"), *rows(2, "A")])]
    )


# ---- independent references ------------------------------------------------------------------------------------


def prompt_of(row):
    return [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]


def cosine(one, other):
    return (one @ other) / (one.norm() * other.norm())


def feature(base, prompt):
    return sum(base["model.embed_tokens.weight"][t] for t in prompt) / len(prompt)


def merged(base, experts, weights):
    """The base's parameters with every expert of one row added to them."""
    found = dict(base)
    for weight, (factors, scale) in zip(weights, experts, strict=True):
        for name, (down, up) in factors.items():
            found[f"{name}.weight"] = found[f"{name}.weight"] + weight * scale * (up @ down)
    return found


def logits(parameters, ids):
    return functional_call(double(), parameters, (), {"input_ids": torch.tensor([ids])}).logits[0]


def nll(parameters, row):
    """Summed over the labelled tokens of one row, and how many there are."""
    predicted = logits(parameters, row["input_ids"]).log_softmax(-1)
    labelled = [at for at, label in enumerate(row["labels"]) if label != -100]
    return -sum(predicted[at - 1, row["labels"][at]] for at in labelled), len(labelled)


def test_mocl_trains_as_merged_weights_row_by_row_do(tmp_path):
    """Two steps of gradient descent on the adapter and the vector, with the matching term, against autograd by hand."""
    old, data, model = two(), mixed(), adapted()
    method = MoCL(temperature=0.3, learned=True, matching=0.7)
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 4, "logging_strategy": "steps", "logging_steps": 1}
    state = {"mocl": state_of(old)}
    trainer = plain(tmp_path, [method], data, model=model, method_state=state, task="C", **settings)
    base = {name: p.detach() for name, p in double().named_parameters()}
    units = [feature(base, prompt_of(row)) for row in data]
    vector = sum(u / u.norm() for u in units)
    vector = vector / vector.norm()
    torch.testing.assert_close(method.vector.detach(), vector, rtol=1e-9, atol=1e-12)
    lora = {
        name: [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    new = {name: [p.detach().clone() for p in pair] for name, pair in lora.items()}
    trainer.train()
    for step in range(2):
        leaves = [vector.requires_grad_(), *(p.requires_grad_() for pair in new.values() for p in pair)]
        sums, counts = [], []
        for row, unit in zip(data, units, strict=True):
            near = torch.stack([cosine(unit, v) for v in (old[0].vector, old[1].vector, vector)])
            weights = (near / 0.3).exp() / (near / 0.3).exp().sum()
            parts = [(old[0].factors, 2.0), (old[1].factors, 1 / 3), (new, 3.0)]
            total, count = nll(merged(base, parts, weights), row)
            sums.append(total)
            counts.append(count)
        own = [1 - cosine(u, vector) for u, row in zip(units, data, strict=True) if row["task"] == "C"]
        matching = 0.7 * sum(own) / len(own)
        loss = sum(sums) / sum(counts) + matching
        log = trainer.state.log_history[step]
        assert log["mocl/loss"] == pytest.approx(matching.item(), abs=1e-6)
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
        gradients = iter(torch.autograd.grad(loss, leaves))
        vector = (vector - 0.5 * next(gradients)).detach()
        new = {name: [(p - 0.5 * next(gradients)).detach() for p in pair] for name, pair in new.items()}
    torch.testing.assert_close(method.vector.detach(), vector, rtol=1e-5, atol=1e-8)
    for name, pair in new.items():
        for ours, reference in zip(lora[name], pair, strict=True):
            torch.testing.assert_close(ours.detach(), reference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "router",
    [RouterEntry(mode="softmax", temperature=0.2), RouterEntry(mode="top-1"), RouterEntry(mode="top-1", unknown=0.3)],
)  # fmt: skip
def test_a_mixed_padded_batch_is_each_row_alone_with_merged_weights(router):
    """Layer output, weights and logits; under top-1 the rows pick different experts, or with a threshold none."""
    three = [*two(), expert("C", 8, [V])]
    model, base = double().eval(), {name: p.detach() for name, p in double().named_parameters()}
    attached = Experts(model, router, three)
    caught = {}
    dict(model.named_modules())[Q].register_forward_hook(lambda m, i, o: caught.update(x=i[0], y=o))
    prompts = [[70, 60], [9, 8, 7, 6, 5], [200, 3, 100], [41, 42, 43, 44]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = model(input_ids=ids, attention_mask=mask).logits
    chosen = set()
    for at, prompt in enumerate(prompts):
        near = torch.stack([cosine(feature(base, prompt), e.vector) for e in three])
        weights = (near / router.temperature).softmax(-1)
        if router.mode == "top-1":
            best = int(near.argmax())
            known = router.unknown is None or near[best] >= router.unknown
            weights = torch.tensor([float(known and e == best) for e in range(3)])
            chosen.add(best if known else None)
        torch.testing.assert_close(attached.routing.weights[at], weights.double(), rtol=1e-6, atol=1e-9)
        whole = merged(base, [(e.factors, e.scale) for e in three], weights.double())
        torch.testing.assert_close(found[at, -len(prompt) :], logits(whole, prompt), rtol=1e-5, atol=1e-6)
        x = caught["x"][at, -len(prompt) :]
        torch.testing.assert_close(caught["y"][at, -len(prompt) :], x @ whole[f"{Q}.weight"].T)
    if router.mode == "top-1":
        assert len(chosen) > 1 and (None in chosen) == (router.unknown is not None)
    attached.remove()
    torch.testing.assert_close(model(input_ids=ids[2:3, 2:]).logits[0], logits(base, [200, 3, 100]))


def test_generation_keeps_the_weights_of_the_prompt():
    """Greedy, with a cache: what the model says is what merged weights of the prompt say, token by token."""
    old = two()
    model, base = double().eval(), {name: p.detach() for name, p in double().named_parameters()}
    model.generation_config.pad_token_id = 0
    router = RouterEntry(mode="softmax", temperature=0.2)
    attached = Experts(model, router, old)
    prompt = [70, 60, 9]
    made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0
    ].tolist()
    near = torch.stack([cosine(feature(base, prompt), e.vector) for e in old])
    whole = merged(base, [(e.factors, e.scale) for e in old], (near / 0.2).softmax(-1))
    for at in range(len(prompt), len(made)):
        assert made[at] == int(logits(whole, made[:at])[-1].argmax())
    assert attached.routing.weights.shape == (1, 2)


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["param-isolation", "mocl"])
def test_a_first_task_is_plain_lora_and_later_ones_leave_it_as_it_is(name, tmp_path):
    """Through weight decay and another adapter shape; the model then answers as its state does elsewhere."""
    first, ours = (adapted(new_model, lora_dropout=0.1) for _ in range(2))
    for methods, model in (([], first), ([build(name)], ours)):
        trainer = sft(tmp_path, methods, rows(4), model=model, max_steps=3, task="A")
        trainer.train()
    state = trainer.method_state()
    kept = state[name]["tensors"]
    trainer.methods[0].load_state_dict(state[name])  # as a resumed trainer that had finished once
    assert not trainer.methods[0].old and not trainer.methods[0].experts.frozen
    for key, value in first.state_dict().items():
        if "lora_" in key:
            ours_key = key.removeprefix("base_model.model.").replace(".default", "")
            assert torch.equal(kept[f"experts.0.{ours_key}"], value)
    for task, options in (("B", {"r": 3}), ("C", {"target_modules": ["up_proj"]})):
        options = {
            "model": adapted(new_model, **options),
            "weight_decay": 0.3,
            "learning_rate": 2e-2,
        }
        trainer = sft(
            tmp_path, [build(name)], rows(4, task), method_state=state, task=task, max_steps=3, **options
        )
        trainer.train()
        later = trainer.method_state()
        assert all(torch.equal(later[name]["tensors"][key], v) for key, v in state[name]["tensors"].items())
        state = later
    assert [e["task"] for e in state[name]["json"]["experts"]] == ["A", "B", "C"]
    ids = torch.tensor([list(b"A:1="), list(b"C:1="), list(b"B:0=")])
    trainer.model.eval()
    with torch.no_grad():
        here = trainer.model(input_ids=ids).logits
        method = build(name)
        method.load_state_dict(state[name])
        loaded = new_model().eval()
        Experts(loaded, method.router(), method.old)
        torch.testing.assert_close(loaded(input_ids=ids).logits, here, rtol=1e-5, atol=1e-5)


def test_texts_without_a_prompt_are_routed_by_all_their_tokens(tmp_path):
    """Stage cpt: everything is labelled; the vector is that of whole texts, and each finds its own expert again."""
    state, base = None, new_model().model.embed_tokens.weight.detach()
    for task, texts in (("A", ["aab aba", "ab ba"]), ("B", ["XYX YYX XX", "YX"])):
        trainer = sft(
            tmp_path,
            [ParamIsolation()],
            [{"text": text} for text in texts],
            model=adapted(new_model),
            task=task,
            method_state=state,
            max_steps=1,
        )
        trainer.train()
        state = trainer.method_state()
        rows_ = [row["input_ids"] for row in trainer.train_dataset]
        units = torch.stack([torch.nn.functional.normalize(base[ids].mean(0), dim=0) for ids in rows_])
        vector = torch.nn.functional.normalize(units.mean(0), dim=0)
        at = len(state["param-isolation"]["json"]["experts"]) - 1
        torch.testing.assert_close(state["param-isolation"]["tensors"][f"vectors.{at}"], vector)
    trainer.model.eval()
    for batch in trainer.context.batches(batch_size=2):
        trainer.context.loss(batch)
        assert trainer.methods[0].experts.routing.weights.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_with_the_adapter_off_the_model_is_the_one_before_the_update(tmp_path):
    """So that a method that asks for a reference (distillation) does not get the bare base."""
    old, ids = two(), torch.tensor([list(b"C:0="), list(b"C:1=")])
    for method in (MoCL(), ParamIsolation()):
        state = {method.name: state_of(old)}
        trainer = plain(
            tmp_path, [method], mixed(), model=adapted(), method_state=state, task="C", max_steps=2
        )
        trainer.train()
        before = double().eval()
        Experts(before, method.router(), old)
        with torch.no_grad(), trainer._reference() as model:
            model.eval()
            torch.testing.assert_close(model(input_ids=ids).logits, before(input_ids=ids).logits)
        assert not torch.equal(trainer.model(input_ids=ids).logits, before(input_ids=ids).logits)


class Recall(Method):
    """Its loss runs the model on a row of its own, in training mode."""

    name = "recall"
    needs = frozenset({"likelihood"})
    teaches = True

    def prepare_model(self, model, ctx):
        (self.batch_,) = ctx.batches(rows(1, "A"), batch_size=1)

    def loss(self, step):
        with torch.set_grad_enabled(self.teaches):
            return step.loss_of(self.batch_)


class Measure(Recall):
    name, teaches = "measure", False


@pytest.mark.parametrize("other", [None, OldTeacherDistill, Measure])
@pytest.mark.parametrize("make", [lambda: MoCL(learned=True), ParamIsolation])
def test_gradient_checkpointing_gives_the_same_gradients(make, other, tmp_path):
    """Beside other methods' forwards too, which come before the backward pass that runs the layers again."""
    ends = []
    for checkpointing in (False, True):
        methods = [*([other()] if other else []), make()]  # a vector's loss is that of the trainer's rows
        state, options = {methods[-1].name: state_of(two())}, {"gradient_checkpointing": checkpointing}
        trainer = sft(
            tmp_path,
            methods,
            rows(4, "C"),
            model=adapted(),
            method_state=state,
            task="C",
            max_steps=2,
            **options,
        )
        trainer.train()
        ends.append({k: v for k, v in trainer.model.state_dict().items() if "lora" in k or "vector" in k})
    assert any("vector" in name for name in ends[0]) == methods[-1].learned
    torch.testing.assert_close(ends[0], ends[1])


def test_a_loss_on_rows_of_its_own_is_refused_under_gradient_checkpointing(tmp_path):
    state, options = {"mocl": state_of(two())}, {"model": adapted(), "task": "C", "max_steps": 1}
    sft(tmp_path, [Recall(), MoCL()], rows(4, "C"), method_state=state, **options).train()
    options |= {"model": adapted(), "gradient_checkpointing": True}
    trainer = sft(tmp_path, [Recall(), MoCL()], rows(4, "C"), method_state=state, **options)
    with pytest.raises(Clash, match="as if it were the trainer's batch: gradient_checkpointing=False"):
        trainer.train()


@pytest.mark.parametrize("make", [ParamIsolation, lambda: MoCL(learned=True)])
def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(make, tmp_path):
    (state,) = assert_resumes(lambda: [make()], tmp_path).values()
    assert [e["task"] for e in state["json"]["experts"]] == ["A", "B"] and "vectors.1" in state["tensors"]


@pytest.mark.parametrize("make", [ParamIsolation, MoCL])
def test_it_forgets_less_than_one_lora_trained_on(make, tmp_path):
    assert_forgets_less(lambda: [make()], tmp_path, rank=4, first=True, named=True)


@pytest.mark.parametrize("again", ["class", "method"])
def test_used_again_for_the_next_task_it_knows_what_the_state_says(again, tmp_path):
    """Each trainer after the first has methods of its own, and leaves those of the first as they are."""
    args = SFTConfig(**QUIET, output_dir=str(tmp_path), max_length=64, max_steps=1)
    method = ParamIsolation(unknown=0.2)
    made, state, trainers = continual(SFTTrainer, [method]), None, []
    for task in "ABC":
        made = continual(SFTTrainer, [method]) if again == "method" else made
        data = {"train_dataset": rows(2, task), "processing_class": tiny_tokenizer()}
        trainer = made(adapted(new_model), args=args, task=task, method_state=state, **data)
        trainer.train()
        trainers.append(trainer)
        state = trainer.method_state()
    found = [[e.about.task for e in t.methods[0].learned_experts] for t in trainers]
    assert found == [["A"], ["A", "B"], ["A", "B", "C"]]
    assert trainers[0].methods == [method] and trainers[2].methods[0].unknown == 0.2


# ---- refusals --------------------------------------------------------------------------------------------------


def test_a_saved_model_is_all_experts_and_loads_as_trained(tmp_path):
    base, state, trainer = tiny_model(tmp_path / "base"), None, None
    for task in "AB":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
        options = {"model": model, "task": task, "method_state": state, "max_steps": 4, "learning_rate": 0.1}
        trainer = sft(tmp_path / task, [MoCL()], rows(4, task), **options)
        trainer.train()
        state = trainer.method_state()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (
        tmp_path / "saved/adapter_config.json"
    ).exists()  # plain PEFT would load the newest expert only
    found = load(tmp_path / "saved", base_folder=base, dtype="float32").model
    for task in "AB":
        ids = torch.tensor([tokens(rows(1, task))[0]["input_ids"]])
        torch.testing.assert_close(found(ids).logits, trainer.model.eval()(ids).logits)


def test_what_cannot_work_is_refused_by_name(tmp_path):
    with pytest.raises(Clash, match="param-isolation and o-lora both replace the architecture"):
        continual(object, [ParamIsolation(), OLoRA()])
    with pytest.raises(Clash, match="mocl needs the task of each row, which packing drops"):
        sft(tmp_path, [MoCL()], rows(4), model=adapted(new_model), packing=True)
    state = {"mocl": state_of([expert("A", 1, [Q], kind=torch.float32)])}
    with pytest.raises(BadInput, match=r"an expert of task 'A' already .*another task name"):
        sft(tmp_path, [MoCL()], rows(4), model=adapted(new_model), method_state=state, task="A")
    trained = adapted(new_model)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    for given in (None, state):
        with pytest.raises(BadInput, match="mocl: the adapter changes the model already"):
            sft(tmp_path, [MoCL()], rows(4), model=trained, method_state=given, task="B")
    with pytest.raises(Clash, match="mocl grows one LoRA, and none is in training"):
        MoCL().prepare_model(new_model(), Context("b"))
    for odd, says in (
        ({"model.layers.7.mlp.up_proj": (torch.ones(2, 16), torch.ones(32, 2))}, "which this model lacks"),
        (
            {Q: (torch.ones(3, 16), torch.ones(16, 3))},
            r"are \(3, 16\) and \(16, 3\), not \(2, 16\) and \(16, 2\)",
        ),
        ({DOWN: (torch.ones(2, 16), torch.ones(16, 2))}, r"not \(2, 32\) and \(16, 2\)"),
        (
            {"": (torch.ones(2, 16), torch.ones(16, 2))},
            r"the whole model, .* no linear layer \(LlamaForCausalLM\)",
        ),
        ({"model.embed_tokens": (torch.ones(2, 16), torch.ones(16, 2))}, r"no linear layer \(Embedding\)"),
        (
            {"model.layers.0": (torch.ones(2, 16), torch.ones(16, 2))},
            r"no linear layer \(LlamaDecoderLayer\)",
        ),
    ):
        bad = replace(expert("A", 1, [Q]), factors=odd)
        with pytest.raises(BadInput, match=f"the expert of task 'A': .*{says}"):
            Experts(double(), RouterEntry(mode="top-1"), [bad])
    with pytest.raises(BadInput, match=r"its vector is \(3,\), the input embeddings are 16 wide"):
        Experts(double(), RouterEntry(mode="top-1"), [replace(expert("A", 1, [Q]), vector=torch.ones(3))])
    loaded = double()
    Experts(loaded, RouterEntry(mode="top-1"), two())
    with pytest.raises(Clash, match="routed by token ids"):
        loaded(inputs_embeds=torch.ones(1, 3, 16, dtype=torch.float64))
    with pytest.raises(Clash, match="outside its model"):
        loaded.model.layers[0].self_attn.q_proj(torch.ones(1, 3, 16, dtype=torch.float64))
    for name, wrong in (
        ("mocl", {"temperature": 0}),
        ("mocl", {"learned": 1}),
        ("mocl", {"matching": math.nan}),
        ("mocl", {"samples": 0}),
        ("param-isolation", {"unknown": 2}),
        ("param-isolation", {"samples": 1.5}),
    ):
        with pytest.raises(BadInput, match=f"{name}: {next(iter(wrong))}="):
            build(name, wrong)
