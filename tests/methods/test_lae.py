import numpy as np
import pytest
import torch
from tests.methods.streams import assert_forgets_less
from torch.nn import Linear

from meristem.errors import BadInput, Clash
from meristem.methods import Context, parse
from meristem.methods.base import trainable
from meristem.methods.optimization.lae import LAE
from meristem.training.continual import continual

OLD = {"old": [{"id": "1", "task": "old", "text": "x"}]}


@pytest.mark.parametrize("serve", ["mean", "offline"])
def test_offline_is_the_moving_average_and_the_version_serves_as_it_says(serve):
    """Against the sum of the series in NumPy, in float64."""
    model, decay, steps = Linear(3, 2).double(), 0.8, 6
    method, ctx = LAE(decay=decay, serve=serve), Context("new", history=OLD, model=model)
    method.prepare_model(model, ctx)
    draw = np.random.default_rng(0)
    path = {name: [p.detach().numpy().copy()] for name, p in model.named_parameters()}
    for _ in range(steps):
        for name, p in model.named_parameters():
            move = draw.normal(size=p.shape)
            path[name].append(path[name][-1] + move)
            with torch.no_grad():
                p.add_(torch.from_numpy(move))
        with torch.no_grad():
            method.weights(trainable(model), None)
    method.finish(ctx)
    state = method.state_dict()["tensors"]
    for name, p in model.named_parameters():
        shares = [decay**steps] + [(1 - decay) * decay ** (steps - s) for s in range(1, steps + 1)]
        offline = sum(share * value for share, value in zip(shares, path[name], strict=True))
        online = path[name][-1]
        served = offline if serve == "offline" else (online + offline) / 2
        np.testing.assert_allclose(state[f"offline.{name}"].numpy(), offline, atol=1e-12)
        np.testing.assert_allclose(state[f"online.{name}"].numpy(), online, atol=1e-12)
        np.testing.assert_allclose(p.detach().numpy(), served, atol=1e-12)


def learnt(method, model, task, move, **ctx):
    """An update that adds ``move`` to every weight, and the method's state after it."""
    ctx = Context(task, model=model, **ctx)
    method.prepare_model(model, ctx)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(move)
        method.weights(trainable(model), None)
    online = values(model)
    method.finish(ctx)
    return online, method.state_dict()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loaded(state, **arguments):
    method = LAE(**arguments)
    method.load_state_dict(state)
    return method


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("serve", ["mean", "offline"])
def test_the_first_task_is_learnt_plainly_and_the_next_goes_on_from_online(serve, kept):
    """Also where the version holds what was served in half precision, and the next update serves otherwise."""
    model = Linear(3, 2)
    online, state = learnt(LAE(serve=serve), model, "a", 1.0)
    torch.testing.assert_close(values(model), online, rtol=0, atol=0)
    online, state = learnt(loaded(state, serve=serve), model, "b", 1.0)
    assert not torch.equal(model.weight, online["weight"])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(kept))
    third = loaded(state)
    third.prepare_model(model, Context("c", model=model))
    torch.testing.assert_close(values(model), online, rtol=0, atol=0)
    offline = {name: state["tensors"][f"offline.{name}"] for name in online}
    torch.testing.assert_close(third.offline, offline, rtol=0, atol=0)
    assert not third.online


def test_an_update_without_it_in_between_is_not_taken_back():
    model = Linear(3, 2)
    _, state = learnt(LAE(), model, "a", 1.0)
    with torch.no_grad():
        model.weight[0, 0] += 1e-4
    between = values(model)
    third = loaded(state)
    third.prepare_model(model, Context("c", model=model))
    for start in (values(model), third.offline):
        torch.testing.assert_close(start, between, rtol=0, atol=0)
    assert not third.online


def test_a_slow_average_of_half_precision_weights_moves():
    model = Linear(3, 2, bias=False).bfloat16()
    method, ctx = LAE(decay=0.9999), Context("new", history=OLD, model=model)
    method.prepare_model(model, ctx)
    start = model.weight.detach().float().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
        for _ in range(100):
            method.weights(trainable(model), None)
    moved = (method.offline["weight"] - start) / (model.weight.detach().float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**100), rtol=1e-2, atol=0)


def test_forgets_less_than_sequential_fine_tuning(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "claims"
    assert_forgets_less(lambda: [LAE(decay=0.99)], folder)


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(Clash, match="lae works in stages ca, cit, cpt, not in rl"):
        continual(type("GRPOTrainer", (), {}), [LAE()])
    for text, says in (("lae:decay=1", "decay=1"), ("lae:serve=both", "must be one of mean, offline")):
        with pytest.raises(BadInput, match=says):
            parse(text)
    wide, narrow = Linear(4, 2), Linear(3, 2)
    first, ctx = LAE(), Context("a", model=wide)
    first.prepare_model(wide, ctx)
    first.finish(ctx)
    other = LAE()
    other.load_state_dict(first.state_dict())
    with pytest.raises(BadInput, match=r"lae: .*weight is \(2, 4\) there, \(2, 3\) here"):
        other.prepare_model(narrow, ctx)
