import pytest
import torch
from tests.tiny import new_model
from torch.func import functional_call, grad, vmap

from meristem.errors import BadInput
from meristem.methods import EWC, Context
from meristem.methods.base import trainable

torch.set_num_threads(1)  # a tiny model is faster so, and test processes share the cores


def batch(seed, rows=4, length=7):
    torch.manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def nll(model, inputs):
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def context(model, data, task="a", **more):
    """A context whose rows are row numbers of ``data``."""

    def batcher(rows, size):
        for row in rows:
            yield {key: value[row["n"] : row["n"] + 1] for key, value in data.items()}

    rows = [{"n": n, "id": str(n), "task": task} for n in range(len(data["labels"]))]
    return Context(task, rows=rows, model=model, batcher=batcher, loss_of=lambda b: nll(model, b), **more)


def reference_fisher(model, data):
    """vmap over rows of grad of the summed log-likelihood, squared, then averaged (no autograd loop)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def log_likelihood(params, ids, labels):
        logits = functional_call(model, params, (), {"input_ids": ids[None], "use_cache": False}).logits[
            0, :-1
        ]
        wanted, kept = labels[1:].clamp(min=0), labels[1:] != -100
        return (torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0] * kept).sum()

    each = vmap(grad(log_likelihood), in_dims=(None, 0, 0))(params, data["input_ids"], data["labels"])
    return {name: value.square().mean(0) for name, value in each.items()}


@pytest.fixture
def model():
    return new_model(1)


def test_the_fisher_is_the_mean_of_squared_per_row_gradients(model):
    data = batch(0)
    method = EWC()
    model.train()
    method.finish(context(model, data))
    assert model.training
    for name, expected in reference_fisher(model, data).items():
        torch.testing.assert_close(method.fisher[name], expected, rtol=1e-3, atol=1e-5)


def test_the_fisher_is_not_the_squared_gradient_of_the_batch_mean(model):
    data = batch(0)
    method = EWC()
    method.finish(context(model, data))
    tokens = int((data["labels"][:, 1:] != -100).sum()) / len(data["labels"])
    params = trainable(model)
    wrong = torch.autograd.grad(nll(model, data) * tokens, list(params.values()))
    ratio = sum(f.sum() for f in method.fisher.values()) / sum(g.square().sum() for g in wrong)
    assert ratio > 1.5


def test_the_penalty_gradient_is_strength_times_fisher_times_distance(model):
    method = EWC(strength=7.0)
    method.finish(context(model, batch(0)))
    params = trainable(model)
    with torch.no_grad():
        for p in params.values():
            p.add_(0.01 * torch.randn_like(p))
    value = method.penalty(params)
    grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    expected = 0.0
    for name, p in params.items():
        distance = p.detach() - method.anchor[name]
        torch.testing.assert_close(grads[name], 7.0 * method.fisher[name] * distance)
        expected += float((method.fisher[name] * distance**2).sum()) * 3.5
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_without_a_fisher_the_penalty_is_zero(model):
    value = EWC().penalty(trainable(model))
    assert float(value) == 0 and not value.requires_grad


def test_online_over_tasks_the_fisher_decays_and_the_anchor_moves(model):
    first, second = batch(0), batch(5)
    method = EWC(gamma=0.5)
    method.finish(context(model, first))
    old = dict(method.fisher)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    method.finish(context(model, second, "b"))
    new = reference_fisher(model, second)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(method.fisher[name], 0.5 * old[name] + new[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(method.anchor[name], model.get_parameter(name).detach())


def test_history_gives_a_fisher_at_the_start_weights(model):
    data = batch(0)
    ctx = context(model, data)
    ctx.history, ctx.rows = {"a": ctx.rows}, []
    method = EWC()
    method.prepare_model(model, ctx)
    name = "model.norm.weight"
    torch.testing.assert_close(method.fisher[name], reference_fisher(model, data)[name], rtol=1e-3, atol=1e-5)
    before = method.state_dict()
    method.prepare_model(model, ctx)  # a state is there now: history is left alone
    torch.testing.assert_close(method.state_dict()["tensors"], before["tensors"], rtol=0, atol=0)


def test_samples_limits_the_rows(model):
    seen = []
    ctx = context(model, batch(0, rows=6))
    ctx.reporter = lambda label, total: seen.append((label, total)) or (lambda done: seen.append(done))
    EWC(samples=2).finish(ctx)
    assert seen == [("Fisher of a", 2), 1, 1]


def test_state_is_fp32_and_fits_the_same_parameters_only(model):
    method = EWC()
    method.finish(context(model.bfloat16(), batch(0)))
    state = method.state_dict()
    assert {v.dtype for v in state["tensors"].values()} == {torch.float32}
    assert {k.split(".")[0] for k in state["tensors"]} == {"fisher", "anchor"}
    again = EWC()
    again.load_state_dict(state)
    again.prepare_model(model, context(model, batch(0)))
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(BadInput, match=r"model.norm.weight is \(16,\) there, absent here"):
        again.prepare_model(model, context(model, batch(0)))
