import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tests.methods.streams import assert_forgets_less
from tests.training.stream import sft
from torch.nn import Linear

from meristem.errors import BadInput, Clash
from meristem.methods import Context, ExperienceReplay, parse
from meristem.methods.base import trainable
from meristem.methods.replay.mer import MER
from meristem.training.continual import continual


@pytest.mark.parametrize("steps", [4, 7])
def test_every_k_steps_the_weights_go_back_part_of_the_way(steps):
    """Against the formula in NumPy, in float64; a window cut short is closed in the same way."""
    model = Linear(3, 2).double()
    method, ctx = MER(every=3, beta=0.3), Context("a", model=model)
    method.prepare_model(model, ctx)
    draw = np.random.default_rng(0)
    theta = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    start = {name: value.copy() for name, value in theta.items()}
    for step in range(1, steps + 1):
        for name, p in model.named_parameters():
            move = draw.normal(size=p.shape)
            theta[name] = theta[name] + move
            with torch.no_grad():
                p.add_(torch.from_numpy(move))
            if step % 3 == 0 or step == steps:
                theta[name] = start[name] + 0.3 * (theta[name] - start[name])
                start[name] = theta[name].copy()
        with torch.no_grad():
            method.weights(trainable(model), None)
    method.finish(ctx)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), theta[name], rtol=0, atol=1e-12)


def test_half_precision_weights_are_interpolated_in_fp32_and_rounded_once():
    model = Linear(3, 2, bias=False).bfloat16()
    method = MER(every=1, beta=0.5)
    method.prepare_model(model, Context("a", model=model))
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(0.7)
        moved = model.weight.detach().clone()
        method.weights(trainable(model), None)
    expected = (start.float() + 0.5 * (moved.float() - start.float())).bfloat16()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=0)


def test_the_training_set_is_that_of_experience_replay():
    old = [{"id": f"a-{n}", "task": "a", "text": f"a {n}"} for n in range(40)]
    new = [{"id": f"b-{n}", "task": "b", "text": f"b {n}"} for n in range(30)]
    ctx = Context("b", history={"a": old}, rows=new)
    options = {"ratio": 0.25, "capacity": 20, "buffer": "reservoir", "seed": 4}
    assert MER(**options).prepare_data(new, ctx) == ExperienceReplay(**options).prepare_data(new, ctx)


def test_forgets_less_than_sequential_fine_tuning(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "claims"
    assert_forgets_less(
        lambda: [MER(ratio=0.5, every=5, beta=0.5)], folder, rate=1.6e-2
    )  # half the way, twice


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(Clash, match="mer works in stages ca, cit, cpt, not in rl"):
        continual(type("GRPOTrainer", (), {}), [MER()])
    for text, says in (("mer:every=0", "every=0"), ("mer:beta=0", "beta=0"), ("mer:beta=1.5", "beta=1.5")):
        with pytest.raises(BadInput, match=says):
            parse(text)
    assert parse("mer:every=7,ratio=0.2").arguments()["every"] == 7


def test_a_window_of_another_shape_is_refused(tmp_path):
    lora = [LoraConfig(r=r, target_modules=["q_proj"], task_type="CAUSAL_LM") for r in (2, 4)]
    data = [{"prompt": "a", "completion": "b"}]
    first, other = (sft(tmp_path, [MER()], data, peft_config=config) for config in lora)
    state = first.methods[0].state_dict()
    assert json.loads(json.dumps(state["json"]))["steps"] == 0
    with pytest.raises(BadInput, match="mer: the saved state is for another set of trainable parameters"):
        other.methods[0].load_state_dict(state)
