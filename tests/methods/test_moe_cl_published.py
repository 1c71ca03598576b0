"""MoE-CL's published equations: against two whole FFN branches in float64, row by row, and in their cost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model
from torch.nn.functional import cross_entropy, silu
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import FalconH1Config, FalconH1ForCausalLM, GPT2Config, GPT2LMHeadModel

from meristem.errors import BadInput, Clash
from meristem.methods.architecture.moe_cl.ffn import FfnMixtures
from meristem.methods.architecture.moe_cl.ffn_experts import Before
from meristem.methods.architecture.moe_cl.published_adversary import Discriminators

MLPS = [f"model.layers.{n}.mlp" for n in range(2)]
PARTS = ("gate_proj", "up_proj", "down_proj")
RANK, ALPHA, TASKS, SCALE = 3, 12, 4, 12 / 6
PROMPTS = [[70, 60, 5], [9, 8, 7, 6, 5, 4], [200, 3], [41, 42, 43, 44]]


@dataclass(frozen=True)
class Lora:
    factors: dict
    scale: float


def draw(seed):
    made = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.4 * torch.randn(shape, generator=made, dtype=torch.float64)


def double():
    return new_model().double()


def lora(seed, rank=RANK, scale=SCALE):
    new, widths = draw(seed), {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    return Lora(
        {
            f"{name}.{part}": (new(rank, widths[part][0]), new(widths[part][1], rank))
            for name in MLPS
            for part in PARTS
        },
        scale,
    )


def gates(seed=50, make=lambda value: value):
    new = draw(seed)
    return {name: make(new(2, 16)) for name in MLPS}


def heads(seed=60):
    new = draw(seed)
    return {name: torch.nn.Parameter(new(TASKS, 16)) for name in MLPS}


def holding(shared, newest, base=double, **options):
    """A PEFT model whose adapter is the two experts."""
    settings = {"r": 2 * RANK, "lora_alpha": ALPHA, "target_modules": [*PARTS], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if name in shared.factors:
                (a_0, b_0), (a_t, b_t) = shared.factors[name], newest.factors[name]
                layer.lora_A["default"].weight.copy_(torch.cat([a_0, a_t]))
                layer.lora_B["default"].weight.copy_(torch.cat([b_0, b_t], 1))
    return model


def padded(prompts, left=False):
    width = max(map(len, prompts))
    pads = [[0] * (width - len(p)) for p in prompts]
    ids = [pad + p if left else p + pad for p, pad in zip(prompts, pads, strict=True)]
    ones = [[1] * len(p) for p in prompts]
    mask = [pad + one if left else one + pad for one, pad in zip(ones, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


# ---- an independent reference: two FFN branches, each on its own merged weights --------------------------------


def branch(mlp, name, expert, x, thin=lambda value: value):
    w1, w3, w2 = (getattr(mlp, part).weight for part in PARTS)
    (a1, b1), (a3, b3), (a2, b2) = (expert.factors[f"{name}.{part}"] for part in PARTS)
    s = expert.scale
    hidden = silu(x @ w1.T + s * (thin(x) @ a1.T) @ b1.T) * (x @ w3.T + s * (thin(x) @ a3.T) @ b3.T)
    return hidden @ w2.T + s * (thin(hidden) @ a2.T) @ b2.T


def reference(model, shared, newest, gate, thin=lambda value: value):
    """Replaces the MLPs of a fresh model; the shared expert's outputs come to lie in the returned dictionary."""
    outputs = {}
    for name in MLPS:
        mlp = model.get_submodule(name)

        def forward(x, mlp=mlp, name=name):
            e_0 = branch(mlp, name, shared, x, thin)
            outputs[name] = e_0
            if newest is None:
                return e_0
            g = (x @ gate[name].T).exp()
            g = g / g.sum(-1, keepdim=True)
            return g[..., :1] * e_0 + g[..., 1:] * branch(mlp, name, newest, x, thin)

        mlp.forward = forward
    return outputs


def logits_of(shared, newest, ids, gate=None):
    model = double()
    reference(model, shared, newest, gate or gates())
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def next_token_loss(logits, ids, mask):
    kept = mask[:, 1:].bool()
    return cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept])


@pytest.mark.parametrize("twice", [False, True])
def test_outputs_and_all_gradients_are_those_of_two_branches(twice):
    """A padded batch: logits, loss, and the gradients of both experts, gates, discriminators and input."""
    (ids, mask), shared, newest = padded(PROMPTS), lora(1), lora(2)
    tasks = torch.tensor([2, 2, 0, 3])
    plain = double().requires_grad_(False)
    embedded = plain.get_input_embeddings()(ids).detach()

    x = embedded.clone().requires_grad_()
    leaves = [
        {k: [f.clone().requires_grad_() for f in v] for k, v in e.factors.items()} for e in (shared, newest)
    ]
    gate, head = gates(make=lambda v: v.clone().requires_grad_()), heads()
    e_0 = reference(plain, Lora(leaves[0], SCALE), Lora(leaves[1], SCALE), gate)
    expected = plain(inputs_embeds=x, attention_mask=mask).logits
    terms = []
    for name in MLPS:
        for row in range(len(ids)):
            real = [e_0[name][row, at] for at in range(ids.shape[1]) if mask[row, at]]
            scores = head[name] @ (sum(real) / len(real))
            odds = scores.softmax(-1)
            terms.append(-(odds.softmax(-1) if twice else odds)[tasks[row]].log())
    likelihood = next_token_loss(expected, ids, mask)
    (likelihood - 0.1 * sum(terms) / len(terms)).backward()

    model = holding(shared, newest).train()
    mixtures = FfnMixtures(model, gates(make=torch.nn.Parameter), adapter="default")
    discriminators = Discriminators(mixtures, heads(), softmax_twice=twice)
    ours = embedded.clone().requires_grad_()
    found = model(inputs_embeds=ours, attention_mask=mask).logits
    aux = discriminators.loss(tasks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aux, -0.1 * sum(terms) / len(terms), rtol=1e-9, atol=1e-9)
    (next_token_loss(found, ids, mask) + aux).backward()
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(ours.grad, x.grad, **close)
    for name in MLPS:
        torch.testing.assert_close(mixtures.layers[name].gate.grad, gate[name].grad, **close)
        torch.testing.assert_close(discriminators.heads[name].grad, -head[name].grad, **close)
        assert head[name].grad.norm() > 1e-4
        for part in PARTS:
            layer, key = model.get_base_model().get_submodule(f"{name}.{part}"), f"{name}.{part}"
            for factor, dim, at in (("lora_A", 0, 0), ("lora_B", 1, 1)):
                wanted = torch.cat([leaf[key][at].grad for leaf in leaves], dim)
                torch.testing.assert_close(getattr(layer, factor)["default"].weight.grad, wanted, **close)
                assert all(leaf[key][at].grad.norm() > 1e-4 for leaf in leaves)


def test_the_discriminators_see_the_shared_expert_alone_and_no_padding():
    shared, tasks = lora(1), torch.tensor([0, 1, 2, 3])

    def watched(newest=2):
        model = holding(shared, lora(newest)).train()
        return model, Discriminators(FfnMixtures(model, gates(), adapter="default"), heads(), weight=1.0)

    alone = []
    for prompt, task in zip(PROMPTS, tasks, strict=True):
        model, discriminators = watched()
        model(input_ids=torch.tensor([prompt]))
        alone.append(discriminators.loss(task[None]))
    first = []
    for left, newest in ((False, 2), (True, 2), (True, 3)):
        model, discriminators = watched(newest)
        ids, mask = padded(PROMPTS, left)
        model(input_ids=ids, attention_mask=mask)
        first.append(
            discriminators.mixtures.shared_means()[MLPS[0]]
        )  # before any task's expert has had a say
        model(input_ids=ids, attention_mask=mask)
        if newest == 2:
            torch.testing.assert_close(discriminators.loss(tasks), torch.stack(alone).mean())
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(first[1], first[2])


# ---- inference -------------------------------------------------------------------------------------------------


def served(experts, shared=None, **options):
    model = double().eval()
    model.generation_config.pad_token_id = 0
    return model, FfnMixtures(model, gates(), shared=shared or lora(1), experts=experts, **options)


def test_a_batch_of_many_tasks_is_each_row_alone():
    """Experts of other rank and scale, a row without one, left padding; then again with fewer, which may be cached."""
    experts = [lora(2), lora(3, rank=2, scale=0.5), lora(4)]
    model, mixtures = served(experts)
    ids, mask = padded(PROMPTS, left=True)
    for owners in ([1, None, 2, 1], [0, 0, 0, 0], [None] * 4, [1, None, 2, 1], [2, 1, 0, None]):
        mixtures.route(owners)
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask).logits
        for row, (prompt, owner) in enumerate(zip(PROMPTS, owners, strict=True)):
            wanted = logits_of(lora(1), None if owner is None else experts[owner], prompt)
            torch.testing.assert_close(found[row, -len(prompt) :], wanted, rtol=1e-6, atol=1e-8)
    mixtures.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, double()(input_ids=ids).logits)
    assert all("forward" not in vars(model.get_submodule(name)) for name in MLPS)


def test_greedy_answers_with_a_cache_are_those_of_the_equations():
    experts, prompts = [lora(2), lora(3)], PROMPTS[:3]
    model, mixtures = served(experts)
    owners = [1, None, 0]
    mixtures.route(owners)
    ids, mask = padded(prompts, left=True)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        answer = list(prompt)
        for _ in range(5):
            expert = None if owner is None else experts[owner]
            answer.append(int(logits_of(lora(1), expert, answer)[-1].argmax()))
        assert made[row, -len(answer) :].tolist() == answer


def test_each_base_product_is_computed_once_and_unused_experts_never():
    """However many experts there are, and in training with the adversary: W1, W3 and W2 once each, on all tokens."""

    def counted(model, run):
        calls = []
        modules = [
            layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            for layer in (model.get_submodule(f"{name}.{part}") for name in MLPS for part in PARTS)
        ]
        hooks = [
            m.register_forward_hook(lambda m, i, o: calls.append(tuple(i[0].shape[:2]))) for m in modules
        ]
        run()
        for hook in hooks:
            hook.remove()
        return calls

    ids, mask = padded(PROMPTS)
    ranks = []
    for count in (2, 15):
        model, mixtures = served([lora(seed + 2, scale=1.0) for seed in range(count)])
        mixtures.route([0, 1, 1, None])
        calls = counted(model, lambda model=model: model(input_ids=ids, attention_mask=mask))
        assert calls == [tuple(ids.shape)] * 6
        ranks.append({len(p.down) for layer in mixtures.layers.values() for p in layer._latest[1]})
    assert ranks == [{3 * RANK}, {3 * RANK}]
    peft = holding(lora(1), lora(2)).train()
    discriminators = Discriminators(FfnMixtures(peft, gates(), adapter="default"), heads())
    calls = counted(peft.get_base_model(), lambda: peft(input_ids=ids, attention_mask=mask))
    assert calls == [tuple(ids.shape)] * 6
    calls = counted(peft.get_base_model(), lambda: discriminators.loss(torch.tensor([0, 1, 2, 3])))
    assert calls == [(4, 32)] * 2  # W2 on one mean a row


# ---- training --------------------------------------------------------------------------------------------------


class Thin(torch.nn.Module):
    """In the place of dropout, so that the reference can do the same."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 3 > 0)


def test_dropout_thins_what_the_experts_see_and_nothing_else():
    ids, mask = padded(PROMPTS)
    model = holding(lora(1), lora(2), lora_dropout=0.1).train()
    FfnMixtures(model, gates(), adapter="default")
    torch.manual_seed(0)
    one, other = (model(input_ids=ids, attention_mask=mask).logits for _ in range(2))
    assert not torch.allclose(one, other)
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = Thin()
    plain = double()
    reference(plain, lora(1), lora(2), gates(), thin=Thin())
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits,
        plain(input_ids=ids, attention_mask=mask).logits,
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip


def trained(checkpointing, reentrant=False, between=lambda mixtures, model: None, early=True):
    ids, mask = padded(PROMPTS)
    model = holding(lora(1), lora(2)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    mixtures = FfnMixtures(model, gates(make=torch.nn.Parameter), adapter="default", experts=[lora(5)])
    discriminators = Discriminators(mixtures, heads())
    with mixtures.batch(), set_checkpoint_early_stop(early):
        output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        between(mixtures, model)
        loss = next_token_loss(output.logits, ids, mask) + discriminators.loss(torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert not mixtures.shared_means()  # what the backward pass ran again is not kept with its graph
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def elsewhere(mixtures, model):
    """Another method's look at other rows, and an answer of a frozen expert, both before the backward pass."""
    with torch.no_grad(), mixtures.batch():
        model(input_ids=torch.ones(4, 6, dtype=torch.long), attention_mask=torch.ones(4, 6))
    mixtures.route([0])
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    model.train()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("between", [lambda mixtures, model: None, elsewhere])
def test_gradient_checkpointing_gives_the_same_gradients(between, early):
    plain, found = trained(False), trained(True, between=between, early=early)
    assert {n.rsplit(".", 1)[-1] for n in plain} >= {"moe_cl_gate", "moe_cl_discriminator"}
    torch.testing.assert_close(found, plain)


def test_where_checkpointing_would_lose_or_mix_up_the_means_it_is_refused():
    with pytest.raises(Clash, match="reentrant gradient checkpointing: gradient_checkpointing_kwargs="):
        trained(True, reentrant=True)

    def learns(mixtures, model):
        with mixtures.batch():
            model(input_ids=torch.ones(4, 6, dtype=torch.long))

    with pytest.raises(Clash, match="a method's loss on a batch of its own"):
        trained(True, between=learns)


def test_in_training_the_newest_and_after_it_whom_the_rows_are_routed_to():
    """And with the adapter off the model from before: the old shared expert and gates with the frozen experts."""
    (ids, mask), old, owners = padded(PROMPTS), [lora(5), lora(6)], [1, 2, None, 0]
    model = holding(lora(1), lora(2))
    before = Before(lora(7), gates(51))
    mixtures = FfnMixtures(model, gates(), adapter="default", experts=old, before=before)
    mixtures.route(owners)
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            found = model(input_ids=ids, attention_mask=mask).logits
            for row, prompt in enumerate(PROMPTS):
                owner = 2 if training else owners[row]
                expert = None if owner is None else [*old, lora(2)][owner]
                wanted = logits_of(lora(1), expert, prompt)
                torch.testing.assert_close(found[row, : len(prompt)], wanted, rtol=1e-6, atol=1e-8)
        for half in (layer.lora_B["default"].weight for layer in model.modules() if hasattr(layer, "lora_B")):
            half *= 0.5  # as a step of the optimizer would
        found = model(input_ids=ids, attention_mask=mask).logits
        smaller = [Lora({n: (a, b / 2) for n, (a, b) in lora(k).factors.items()}, SCALE) for k in (1, 2)]
        torch.testing.assert_close(found[1, : len(PROMPTS[1])], logits_of(*smaller, PROMPTS[1]))
        with model.disable_adapter():
            found = model(input_ids=ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            expert = {0: old[0], 1: old[1]}.get(owners[row])
            wanted = logits_of(lora(7), expert, prompt, gates(51))
            torch.testing.assert_close(found[row, : len(prompt)], wanted, rtol=1e-6, atol=1e-8)
        FfnMixtures(model, gates(), adapter="default")  # takes the place of the one before
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, double()(input_ids=ids).logits)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_base_with_fp32_experts(autocast):
    """As engines and trainers load them: in bf16, the equations up to its rounding, and gradients in fp32."""
    (ids, mask), shared, newest = padded(PROMPTS), lora(1), lora(2)
    exact = double().to(torch.bfloat16).double()
    reference(exact, shared, newest, gates())
    wanted = exact(input_ids=ids, attention_mask=mask).logits
    base = (lambda: new_model()) if autocast else (lambda: new_model().to(torch.bfloat16))
    model = holding(shared, newest, base).train()
    mixtures = FfnMixtures(model, gates(make=lambda v: torch.nn.Parameter(v.float())), adapter="default")
    discriminators = Discriminators(mixtures, {n: torch.nn.Parameter(h.float()) for n, h in heads().items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(input_ids=ids, attention_mask=mask).logits
        (next_token_loss(found, ids, mask) + discriminators.loss(torch.tensor([0, 1, 2, 3]))).backward()
    kept = mask.bool()
    assert (found[kept] - wanted[kept]).norm() < 0.03 * wanted[kept].norm()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 * 3 + 2) and all(p.grad.dtype == torch.float32 for p in trained.values())


# ---- refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32))
    with pytest.raises(Clash, match="GPT2LMHeadModel has no MLP of gate_proj, up_proj, down_proj and act_fn"):
        FfnMixtures(gpt2, {}, shared=lora(1))
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 16}
    small |= {"mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mlp_multipliers": [0.5, 2.0]}
    with pytest.raises(Clash, match=r"FalconH1ForCausalLM: .*\(FalconH1MLP\) is no plain gated MLP"):
        FfnMixtures(FalconH1ForCausalLM(FalconH1Config(**small)), {}, shared=lora(1))
    with pytest.raises(BadInput, match=r"either adapter .* or shared"):
        FfnMixtures(double(), gates())
    for options, says in (
        ({"r": 5}, r"make it even and one, not \[5\]"),
        ({"target_modules": ["up_proj", "down_proj"]}, "'default' on model.layers.0.mlp.gate_proj"),
    ):
        model = get_peft_model(double(), LoraConfig(**{"r": 6, "target_modules": [*PARTS], **options}))
        with pytest.raises(Clash, match=says):
            FfnMixtures(model, gates(), adapter="default")
    key = f"{MLPS[1]}.down_proj"
    few = {k: v for k, v in lora(2).factors.items() if k != key}
    wrong = {**lora(2).factors, key: lora(2, rank=2).factors[key]}
    for odd, says in (
        ({"experts": [Lora(few, 1.0)]}, f"differ in {key}"),
        ({"experts": [Lora(wrong, 1.0)]}, rf"A and B of {key} are \(2, 32\) and \(16, 2\), not \(3, 32\)"),
        ({"gates": {"model.layers.7.mlp": torch.ones(2, 16)}}, "a gate for model.layers.7.mlp, which is no MLP"),
        ({"gates": {**gates(), MLPS[0]: torch.ones(2, 8)}}, r"is \(2, 8\), not \(2, 16\)"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            FfnMixtures(double(), **{"gates": gates(), "shared": lora(1), **odd})
    model, mixtures = served([lora(2)])
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(Clash, match=r"before their rows were routed: call route\(\)"):
        model(input_ids=ids)
    with pytest.raises(BadInput, match="there is no expert 1: the 1 there are"):
        mixtures.route([1])
    mixtures.route([0, 0])
    with pytest.raises(Clash, match=r"sees \(1, 3, 16\) where 2 rows are routed"):
        model(input_ids=ids)
    peft = holding(lora(1), lora(2))
    mixtures = FfnMixtures(peft, gates(), adapter="default")
    with pytest.raises(
        BadInput, match=r"the discriminator of model.layers.1.mlp must be \(tasks, 16\), not none"
    ):
        Discriminators(mixtures, {MLPS[0]: heads()[MLPS[0]]})
    peft.merge_adapter()
    with pytest.raises(Clash, match="unmerge the adapter"):
        peft(input_ids=ids)
