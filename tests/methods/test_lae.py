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


def test_the_first_task_is_learnt_plainly_and_the_next_goes_on_from_online():
    model = Linear(3, 2)
    first, ctx = LAE(), Context("a", model=model)
    first.prepare_model(model, ctx)
    with torch.no_grad():
        model.weight.add_(1.0)
        first.weights(trainable(model), None)
    learnt = model.weight.detach().clone()
    first.finish(ctx)
    torch.testing.assert_close(model.weight.detach(), learnt, rtol=0, atol=0)
    state = first.state_dict()
    state["tensors"]["online.weight"] += 2.0  # as if the version served something else
    nxt = LAE()
    nxt.load_state_dict(state)
    nxt.prepare_model(model, Context("b", model=model))
    torch.testing.assert_close(model.weight.detach(), learnt + 2.0, rtol=0, atol=0)
    assert not nxt.online and set(nxt.offline) == {"weight", "bias"}


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
