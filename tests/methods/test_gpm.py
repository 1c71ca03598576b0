"""GPM: its bases against NumPy's SVD, its steps against the formula, and its claim."""

import numpy as np
import pytest
import torch
from tests.methods.adapters import adapter, assert_forgets_less, assert_resumes
from tests.tiny import new_model
from tests.training.stream import plain, rows, sft, tokens, weights
from torch import nn

from meristem.errors import BadInput, Clash
from meristem.methods import Context, build
from meristem.methods.base import trainable
from meristem.methods.optimization.gpm import GPM, extended


def by_svd(columns, basis, threshold):
    """Equations 5 to 9 of the paper in NumPy, one direction after the other."""
    rest = columns if basis is None else columns - basis @ basis.T @ columns
    left, sizes, _ = np.linalg.svd(rest)
    total = np.linalg.norm(columns) ** 2
    held, count = total - np.linalg.norm(rest) ** 2, 0
    while held < threshold * total:
        held, count = held + sizes[count] ** 2, count + 1
    new = left[:, :count]
    return new if basis is None else np.hstack([basis, new])


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97])
def test_bases_grow_as_in_the_paper(threshold):
    torch.manual_seed(0)
    basis, expected = torch.zeros(12, 0, dtype=torch.float64), None
    for task in range(4):
        columns = torch.randn(12, 12, dtype=torch.float64) @ torch.diag(torch.arange(12.0).double().exp())
        columns = columns @ torch.randn(12, 30, dtype=torch.float64) + task
        basis, expected = extended(basis, columns, threshold), by_svd(columns.numpy(), expected, threshold)
        assert basis.shape == expected.shape
        np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-8)
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    full = extended(basis, torch.randn(12, 40, dtype=torch.float64), 1.0)
    assert full.shape == (12, 12) and torch.equal(extended(full, columns, 1.0), full)


def inputs_by_hand(model, data):
    """Inputs of lora_A and lora_B of the first layer's q_proj, and of the second's, over all tokens, (d, n)."""
    inner = model.get_base_model().model
    found = []
    for layer in (0, 1):
        hidden = torch.cat([model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
                            .hidden_states[layer][0] for row in data])  # fmt: skip
        block = inner.layers[layer]
        x = block.input_layernorm(hidden)
        found += [x.T, (x @ block.self_attn.q_proj.lora_A["default"].weight.T).T]
    return [value.detach().numpy() for value in found]


def test_lora_is_projected_by_its_inputs_and_its_inner_activations(tmp_path):
    model, expected, state = adapter().double(), [None] * 4, None
    for task in "AB":
        data = tokens(rows(5, task))
        method = GPM(threshold=0.9, positions=99)
        trainer = plain(tmp_path, [method], data, model=model, task=task, method_state=state)
        method.finish(trainer.context)
        state = trainer.method_state()
        taken = inputs_by_hand(model, data)
        expected = [by_svd(c, old, 0.9) for c, old in zip(taken, expected, strict=True)]
    for number, basis in enumerate(expected):
        name = f"base_model.model.model.layers.{number // 2}.self_attn.q_proj.lora_{'AB'[number % 2]}.default.weight"
        found = method.basis[name]
        assert found.shape == basis.shape
        np.testing.assert_allclose(found @ found.T, basis @ basis.T, atol=1e-5)
    assert len(method.basis) == 8 and method.state_dict()["json"] == {"tasks": ["A", "B"]}


def remembering(model, **options):
    """A GPM with random bases of two directions for each linear layer."""
    torch.manual_seed(4)
    method = GPM(**options)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            method.basis[f"{name}.weight"] = torch.linalg.qr(torch.randn(module.in_features, 2))[0]
    return method


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_the_projected_gradient(accumulation, tmp_path):
    model, data = new_model(), tokens(rows(4))
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    settings |= {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    method, start = remembering(model), weights(model)
    bases = dict(method.basis)  # finish() makes the method's own grow
    plain(tmp_path, [method], data, model=model, **settings).train()
    other = new_model()
    other(
        **{key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "labels")}
    ).loss.backward()
    for name, p in other.named_parameters():
        wanted = start[name]
        if name in bases:
            basis = bases[name]
            wanted = wanted - 0.1 * p.grad @ (torch.eye(len(basis)) - basis @ basis.T)
        torch.testing.assert_close(weights(model)[name], wanted, rtol=1e-4, atol=1e-6)


def test_adamw_stays_in_the_free_directions_and_other_weights_are_still(tmp_path):
    model = new_model()
    method, start = remembering(model), weights(model)
    bases = dict(method.basis)  # finish() makes the method's own grow
    sft(tmp_path, [method], rows(4), model=model, max_steps=5, weight_decay=0.3, learning_rate=2e-2).train()
    for name, p in model.named_parameters():
        moved = p.detach() - start[name]
        if name in bases:
            assert moved.norm() > 0.1 and (moved @ bases[name]).abs().max() < 1e-6
        else:
            assert not moved.any()


def test_old_inputs_give_what_they_gave(tmp_path):
    """With a threshold of 1 and free directions left, an old row keeps its very answer while new rows are learned."""
    model, old = adapter(), tokens(rows(1, "A"))
    ids = torch.tensor([old[0]["input_ids"]])
    method = GPM(threshold=1.0, positions=99)
    plain(tmp_path, [method], old, model=model, task="A", max_steps=3).train()
    full = {name: basis.shape[1] == len(basis) for name, basis in method.basis.items()}
    assert {name for name, is_full in full.items() if is_full} == {name for name in full if "lora_B" in name}
    model.eval()
    before, start = model(input_ids=ids).logits.detach(), weights(model)
    other = [{**row, "input_ids": [i + 40 for i in row["input_ids"]]} for row in tokens(rows(4, "B"))]
    again = {"task": "B", "max_steps": 5, "learning_rate": 5e-2}
    with pytest.raises(
        BadInput, match=r"gpm remembers an earlier update .*: give method_state= of that update"
    ):
        plain(tmp_path, [method], other, model=model, **again)
    plain(tmp_path, [method], other, model=model, method_state={"gpm": method.state_dict()}, **again).train()
    model.eval()
    moved = sum(
        float((value - start[name]).norm()) for name, value in weights(model).items() if "lora_A" in name
    )
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
    assert moved > 0.5


def test_history_gives_the_bases_at_the_start_weights(tmp_path):
    model, old = adapter(), rows(5, "A")
    from_history = GPM()
    trainer = sft(tmp_path, [from_history], rows(4, "B"), model=model, task="B", history={"A": old})
    assert from_history.tasks == ["A"] and model.training
    again = GPM()
    again.load_state_dict(from_history.state_dict())
    again.prepare_model(model, trainer.context)  # a state is there now: history is left alone
    assert again.tasks == ["A"] and again.basis.keys() == from_history.basis.keys()
    from_history.finish(trainer.context)
    assert from_history.tasks == ["A", "B"]
    assert all(b.shape[1] >= again.basis[n].shape[1] for n, b in from_history.basis.items())


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(tmp_path):
    state = assert_resumes(lambda: [GPM(threshold=0.8)], tmp_path)["gpm"]
    assert state["json"] == {"tasks": ["A", "B"]} and {v.dtype for v in state["tensors"].values()} == {
        torch.float32
    }


def test_it_forgets_less_than_sequential_fine_tuning(tmp_path):
    assert_forgets_less(lambda: [GPM(threshold=0.999)], tmp_path, rank=12)


def test_what_does_not_fit_is_refused_by_name():
    model = adapter()
    method = remembering(model)
    with pytest.raises(BadInput, match=r"gpm: .*another set of trainable layers \(base_model"):
        method.prepare_model(model, Context("b"))
    method.basis = {n: torch.eye(5)[:, :1] for n in trainable(model)}
    with pytest.raises(BadInput, match="width 5 to base_model"):
        method.prepare_model(model, Context("b"))
    with pytest.raises(Clash, match="gpm projects the weights of linear layers"):
        GPM().prepare_model(new_model().requires_grad_(False), Context("b"))
    for key, value in (
        ("threshold", 0),
        ("threshold", 1.1),
        ("increase", -1),
        ("samples", 0),
        ("positions", 1.5),
    ):
        with pytest.raises(BadInput, match=f"gpm: {key}="):
            build("gpm", {key: value})
