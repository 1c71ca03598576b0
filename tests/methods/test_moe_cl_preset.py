"""MoE-CL's published preset as a method: what it learns, keeps, carries, resumes, serves and refuses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.methods.adapters import assert_resumes
from tests.methods.test_moe_cl_published import (
    MLPS,
    PARTS,
    Lora,
    branch,
    double,
    draw,
    gates,
    heads,
    lora,
    padded,
    reference,
)
from tests.methods.test_task_experts import Measure
from tests.tiny import new_model, tiny_model, tiny_tokenizer
from tests.training.stream import plain, rows, sft, tokens
from transformers import AutoModelForCausalLM, TrainerCallback

from meristem.engine.load import load
from meristem.errors import BadInput, Clash
from meristem.experts_format import ExpertEntry
from meristem.methods import build
from meristem.methods.architecture.experts import Expert, of
from meristem.methods.architecture.moe_cl import MoECL
from meristem.methods.architecture.moe_cl.ffn_export import _start, distill_expert
from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts, ffn_gates_in
from meristem.methods.architecture.moe_cl.published import PublishedMoECL
from meristem.methods.architecture.task_experts import experts_in, shared_in, state_of

TARGETS = [f"{name}.{part}" for name in MLPS for part in PARTS]
NAME = "moe-cl"


def published(**arguments):
    return MoECL(preset="published", **{"depth": 1, **arguments})


def adapted(base=new_model, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": [*PARTS], "task_type": "CAUSAL_LM"}
        return get_peft_model(base(), LoraConfig(**{**settings, **options}))


def update(folder, task, state=None, methods=None, **options):
    settings = {"model": adapted(), "max_steps": 3, "learning_rate": 2e-2, **options}
    trainer = sft(folder, methods or [published()], rows(4, task), task=task, method_state=state, **settings)
    trainer.train()
    return trainer


def learned(*tasks):
    """The state of a version with these tasks, all values drawn; its shared expert is lora(1), task n's lora(2 + n)."""
    entry = {"rank": 3, "alpha": 6, "targets": TARGETS}
    found = [
        Expert(
            ExpertEntry(task=task, prompts=2, **entry),
            lora(2 + at).factors,
            draw(at)(16),
            None,
            draw(at)(2, 16),
        )
        for at, task in enumerate(tasks)
    ]
    state = state_of(found, Expert(ExpertEntry(task="shared", **entry), lora(1).factors, torch.empty(0)))
    state["json"]["base"] = None
    state["tensors"] |= {f"gates.{name}": value for name, value in gates().items()}
    state["tensors"] |= {f"discriminators.{name}": value.detach() for name, value in heads().items()}
    return {NAME: state}


def test_two_steps_are_gradient_descent_on_the_papers_loss(tmp_path):
    """The trainer's own loop, with two old tasks behind it, against autograd through two whole FFN branches."""
    data, state = (
        tokens([{**r, "prompt": r["prompt"] * (n + 1)} for n, r in enumerate(rows(3, "C"))]),
        learned("A", "B"),
    )
    settings = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 3, "logging_strategy": "steps", "logging_steps": 1}
    method = published()
    trainer = plain(tmp_path, [method], data, model=adapted(double), task="C", method_state=state, **settings)
    layers = dict(trainer.model.get_base_model().named_modules())
    start = {}
    for name in TARGETS:
        down, up = (getattr(layers[name], f"lora_{f}")["default"].weight.detach().clone() for f in "AB")
        for given, part in zip(lora(1).factors[name], (down[:3], up[:, :3]), strict=True):
            torch.testing.assert_close(part, given)
        assert down[3:].abs().min() > 0 and not up[:, 3:].any()
        start[name] = down, up
    trainer.train()

    ids, mask = padded([row["input_ids"] for row in data])
    labels = torch.tensor([[*row["labels"], *[-100] * (ids.shape[1] - len(row["labels"]))] for row in data])
    values = {f"{n}.{f}": v for n, pair in start.items() for f, v in zip("AB", pair, strict=True)}
    values |= {f"{n}.gate": v for n, v in gates().items()} | {
        f"{n}.head": v.detach() for n, v in heads().items()
    }
    for step in range(2):
        values = {name: value.detach().requires_grad_() for name, value in values.items()}
        halves = [
            Lora({n: (values[f"{n}.A"][part], values[f"{n}.B"][:, part]) for n in TARGETS}, 2.0)
            for part in (slice(3), slice(3, None))
        ]
        model = double()
        e_0 = reference(model, *halves, {n: values[f"{n}.gate"] for n in MLPS})
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        chosen = labels[:, 1:] != -100
        task = -logits[chosen].log_softmax(-1).gather(1, labels[:, 1:][chosen][:, None]).mean()
        aux = 0
        for name in MLPS:
            means = (e_0[name] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            aux = aux - (means @ values[f"{name}.head"].T).log_softmax(-1)[:, 2].mean() / len(MLPS)
        found = torch.autograd.grad(task - 0.1 * aux, list(values.values()))
        signs = [-1 if name.endswith("head") else 1 for name in values]
        values = {n: v - 0.2 * s * g for (n, v), s, g in zip(values.items(), signs, found, strict=True)}
        log = trainer.state.log_history[step]
        assert log["moe-cl/loss"] == pytest.approx(-0.1 * aux.item(), abs=1e-6)
        assert log["loss"] == pytest.approx((task - 0.1 * aux).item(), abs=1e-5)
    close = {"rtol": 1e-5, "atol": 1e-7}  # the trainer's loss is in fp32
    for name in TARGETS:
        for factor in "AB":
            ours = getattr(layers[name], f"lora_{factor}")["default"].weight.detach()
            torch.testing.assert_close(ours, values[f"{name}.{factor}"].detach(), **close)
    after = method.state_dict()["tensors"]
    for name in MLPS:
        torch.testing.assert_close(after[f"gates.{name}"], values[f"{name}.gate"].detach(), **close)
        torch.testing.assert_close(after[f"discriminators.{name}"], values[f"{name}.head"].detach(), **close)


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(tmp_path):
    (state,) = assert_resumes(lambda: [published()], tmp_path, targets=PARTS).values()
    assert [e["task"] for e in state["json"]["experts"]] == ["A", "B"]


def test_later_tasks_leave_the_experts_as_they_are_and_add_one_each(tmp_path):
    """And the discriminators a row, once there are more tasks than they were made for."""
    state, sizes = None, []
    for task in "ABCDEF":
        before = state[NAME]["tensors"] if state else {}
        state = update(tmp_path, task, state, weight_decay=0.3).method_state()
        now = state[NAME]["tensors"]
        own = [name for name in before if name.startswith(("experts.", "vectors.", "residuals."))]
        assert own or task == "A"
        assert all(torch.equal(now[name], before[name]) for name in own)
        for shared in ("gates.model.layers.0.mlp", "shared.model.layers.0.mlp.up_proj.lora_B.weight"):
            assert not before or not torch.equal(now[shared], before[shared])
        sizes.append(
            {
                p: sum(v.numel() for n, v in now.items() if n.startswith(p))
                for p in ("experts", "gates", "shared")
            }
        )
        assert now["discriminators.model.layers.0.mlp"].shape == (max(4, len(sizes)), 16)
    one = 2 * 3 * 3 * (16 + 32)  # layers, rank, projections
    assert sizes == [{"experts": one * n, "gates": 2 * 2 * 16, "shared": one} for n in range(1, 7)]


def test_a_saved_version_answers_as_trained_row_by_row(tmp_path):
    """One padded batch of two tasks and a stranger, by the engine's loader and in the trainer's model."""
    base = tiny_model(tmp_path / "base")
    state, trainer = None, None
    for task in "AB":
        model = adapted(lambda: AutoModelForCausalLM.from_pretrained(base))
        trainer = update(tmp_path / task, task, state, model=model, learning_rate=0.1, max_steps=4)
        state = trainer.method_state()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved/adapter_config.json").exists()
    loaded = load(tmp_path / "saved", base_folder=base, dtype="float32").model
    tensors = state[NAME]["tensors"]
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in ("A:1=", "B:2=", "????? ???")]
    ids, mask = padded(prompts, left=True)
    with torch.no_grad():
        found = loaded(input_ids=ids, attention_mask=mask).logits
        weights = of(loaded).routing.weights
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids, attention_mask=mask).logits, found)
        for row, prompt in enumerate(prompts):
            place = int(weights[row].argmax()) if weights[row].any() else None
            factors = [
                Lora({n: (tensors[f"{owner}.{n}.lora_A.weight"], tensors[f"{owner}.{n}.lora_B.weight"]) for n in TARGETS}, 2.0)
                for owner in ("shared", f"experts.{place or 0}")
            ]  # fmt: skip
            gate = {n: tensors[f"gates.{n}"] for n in MLPS}
            model = new_model()
            reference(model, factors[0], None if place is None else factors[1], gate)
            alone = model(input_ids=torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(found[row, -len(prompt) :], alone, rtol=1e-4, atol=1e-5)
    assert weights.tolist() == [[1, 0], [0, 1], [0, 0]]


class Look(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        self.owners = []
        self.hook = (
            model.get_base_model()
            .model.layers[0]
            .mlp.register_forward_hook(lambda *_: self.owners.append(of(model).routing.weights.clone()))
        )


def test_replayed_rows_are_their_own_experts(tmp_path):
    """In training too: the row of an old task goes through that task's frozen expert, and trains the shared one."""
    state, look = learned("A", "B"), Look()
    model = adapted(double)
    trainer = plain(
        tmp_path, [published()], tokens([*rows(2, "C"), *rows(1, "A")]), model=model, task="C", method_state=state,
        callbacks=[look], max_steps=1, per_device_train_batch_size=3, learning_rate=0.0,
    )  # fmt: skip
    caught = {}
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda m, i, o: caught.update(x=i[0].detach(), y=o.detach()))
    game, told = trainer.methods[0]._game, []
    plainly = game.loss
    game.loss = lambda tasks: (told.append(tasks.tolist()), plainly(tasks))[1]
    trainer.train()
    (owners,) = look.owners[:1]
    assert told == [owners.argmax(1).tolist()]  # and the discriminators are told the same
    name, base = MLPS[0], double().get_submodule(MLPS[0])
    x, y = caught["x"], caught["y"]
    newest = of(model).mixtures.experts[-1]
    for row, owner in enumerate(owners.argmax(1).tolist()):
        expert = [lora(2), lora(3), newest][owner]
        g = (x[row] @ gates()[name].T).softmax(-1)
        expected = g[:, :1] * branch(base, name, lora(1), x[row]) + g[:, 1:] * branch(
            base, name, expert, x[row]
        )
        torch.testing.assert_close(y[row], expected, rtol=1e-6, atol=1e-8)
    assert sorted(owners.argmax(1).tolist()) == [0, 2, 2]


def test_until_it_is_finished_the_state_is_the_one_before_and_so_is_the_model_without_its_adapter(tmp_path):
    model, ids = adapted(double), torch.tensor([list(b"A:0=")])
    trainer = plain(
        tmp_path, [published()], tokens(rows(2, "C")), model=model, task="C", method_state=learned("A", "B")
    )
    method, name = trainer.methods[0], MLPS[0]
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in (*method._gates_now.values(), *method._heads.values()):
            parameter += 1
        method._gates_now[name][0] += 1
    now = method.state_dict()["tensors"]
    for kind, drawn in (("gates", gates()), ("discriminators", heads())):
        assert torch.equal(now[f"{kind}.{name}"], drawn[name])
        assert not torch.equal(now[f"training.{kind}.{name}"], drawn[name])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(before, double()(input_ids=ids).logits)


def test_beside_a_method_that_looks_at_rows_of_its_own(tmp_path):
    """Its forward comes between the trainer's and the discriminators' loss, and takes nothing from it."""
    ends = []
    for methods in ([published()], [Measure(), published()]):
        trainer = update(tmp_path, "C", learned("A"), methods=methods, model=adapted(double))
        ends.append(trainer.method_state()[NAME]["tensors"])
    torch.testing.assert_close(*ends)


def test_distillation_starts_at_the_mean_gates():
    state, given = learned("A", "B")[NAME], tokens(rows(3, "A"))
    experts = FfnExperts(
        double(), published().router(), experts_in(state), shared=shared_in(state), gates=ffn_gates_in(state)
    )
    experts.pin, inputs, model = 0, [], double()
    model.get_submodule(MLPS[0]).register_forward_hook(lambda m, i, o: inputs.append(i[0][0]))
    for row in given:
        model(input_ids=torch.tensor([row["input_ids"]]))
    share = (torch.cat(inputs) @ gates()[MLPS[0]].T).softmax(-1)[:, 1].mean().item()
    down, up = _start(experts, experts.frozen[0], given).factors[TARGETS[0]]
    (a_0, b_0), (a_t, b_t) = lora(1).factors[TARGETS[0]], lora(2).factors[TARGETS[0]]
    assert torch.equal(down, torch.cat([a_0, a_t])) and abs(share - 0.5) > 1e-3
    torch.testing.assert_close(up, torch.cat([(1 - share) * b_0, share * b_t], 1))


def test_an_expert_distilled_from_a_version_is_a_plain_adapter_near_it(tmp_path):
    base, state = tiny_model(tmp_path / "base"), None
    for task in "AB":
        model = adapted(lambda: AutoModelForCausalLM.from_pretrained(base))
        trainer = update(tmp_path / task, task, state, model=model, learning_rate=0.1, max_steps=6)
        state = trainer.method_state()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load(tmp_path / "saved", base_folder=base, dtype="float32").model
    given = tokens(rows(12, "A"))
    made = distill_expert(of(loaded), "A", given[:9], given[9:], steps=20, batch_size=9, learning_rate=2e-3)
    assert made.rank == 6 and made.fit.kl < made.start.kl
    made.save(tmp_path / "adapter", "A")
    alone = PeftModel.from_pretrained(new_model(), str(tmp_path / "adapter")).eval()
    of(loaded).pin = 0
    kl = 0.0
    with torch.no_grad():
        for row in given[9:]:
            ids = torch.tensor([row["input_ids"]])
            p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (loaded, alone))
            asked = [label != -100 for label in row["labels"][1:]]
            kl += (p.exp() * (p - q)).sum(-1)[asked].sum().item()
    assert kl / made.fit.positions == pytest.approx(made.fit.kl, rel=1e-3, abs=1e-8)
    unfinished = update(tmp_path, "C", state, max_steps=1)
    with pytest.raises(BadInput, match="none may be in training"):
        distill_expert(unfinished.methods[0].experts, "A", given[:9], given[9:])
    with pytest.raises(BadInput, match="no expert of task 'Z': there are A, B"):
        distill_expert(of(loaded), "Z", given[:9], given[9:])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_it_trains_in_mixed_precision(kind, tmp_path):
    """The discriminators' loss is made after the forward, where autocast is off again."""
    options = {"bf16": True, "max_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    trainer = update(tmp_path, "A", model=adapted(lambda: new_model().to(kind)), **options)
    first, second = (entry[f"{NAME}/loss"] for entry in trainer.state.log_history[:2])
    assert first < 0 and second < 0 and first != second


def test_without_an_adversary_there_is_none(tmp_path):
    trainer = update(tmp_path, "A", methods=[published(adversary=0)])
    tensors = trainer.method_state()[NAME]["tensors"]
    assert not any("discriminator" in name for name in tensors) and "gates.model.layers.0.mlp" in tensors


def test_gradient_checkpointing_ends_in_the_same_weights(tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = update(
            tmp_path, "C", learned("A", "B"), model=adapted(double), gradient_checkpointing=checkpointing
        )
        ends.append(trainer.method_state()[NAME]["tensors"])
    torch.testing.assert_close(*ends)


def test_what_cannot_work_is_refused_by_name(tmp_path):
    assert type(build(NAME, {"preset": "published"})) is PublishedMoECL and type(build(NAME)) is MoECL
    for arguments, says in (
        ({"preset": "paper"}, "preset='paper' must be default or published"),
        ({"preset": "published", "protect": 2.0}, "protect=2.0 has no part in preset=published"),
        ({"preset": "published", "routing": "softmax"}, "routing='softmax' has no part in preset=published"),
        ({"softmax_twice": True}, "softmax_twice=True has no part in preset=default"),
        ({"preset": "published", "tasks": 0}, "tasks=0 must be a whole number"),
    ):
        with pytest.raises(BadInput, match=says):
            build(NAME, arguments)
    with pytest.raises(
        Clash, match=r"unlike model.layers.0.self_attn.q_proj here: target_modules=\['gate_proj'"
    ):
        update(tmp_path, "A", model=adapted(target_modules=[*PARTS, "q_proj"]))
    with pytest.raises(BadInput, match="rank 2, alpha 6 do not go with the stored experts"):
        update(tmp_path, "C", learned("A"), model=adapted(r=2))
    with pytest.raises(BadInput, match=r"there is an expert of task 'A' already"):
        update(tmp_path, "A", learned("A"))
    for prefix, says in (
        (
            "gates.",
            "gates.model.layers.0.mlp did not come with the experts, which are those of another preset",
        ),
        ("discriminators.", "no discriminators came with the experts: give the method_state"),
    ):
        state = learned("A")[NAME]
        tensors = {n: v for n, v in state["tensors"].items() if not n.startswith(prefix)}
        with pytest.raises(BadInput, match=says):
            published().load_state_dict({"tensors": tensors, "json": state["json"]})
    state = learned("A")
    state[NAME]["json"]["base"] = "sha256:another"
    with pytest.raises(BadInput, match="trained on another base"):
        update(tmp_path, "C", state)
