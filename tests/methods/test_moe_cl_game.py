"""MoE-CL's discriminators, the confusion of the shared expert, its anchor, and the statistics both live on."""

import copy
import math

import numpy as np
import pytest
import torch
from tests.methods.mixtures import TARGETS, Gradients, adapted, stored
from tests.tiny import new_model
from tests.training.stream import plain, rows, tokens
from torch.nn.functional import cross_entropy

from meristem.methods.architecture.moe_cl import MoECL
from meristem.methods.architecture.moe_cl.adversary import Adversary
from meristem.methods.architecture.moe_cl.codes import Anchor, CodeStatistics, Gatherer

R, WIDTHS = 3, (5, 4, 5)  # layers of two widths


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def two_tasks():
    found = []
    for seed in (1, 2):
        roots = normal(3, R, R, seed=seed)
        roots[1, :, 0] = 0  # a covariance without full rank
        found.append(
            CodeStatistics(normal(3, R, seed=seed + 10), roots @ roots.mT, torch.eye(R).repeat(3, 1, 1))
        )
    return found


def game(ups, steps=2):
    return Adversary(lambda: ups, two_tasks(), 0.05, steps, generator)


def test_discriminators_and_confusion_are_those_of_one_layer_after_the_other():
    """Three rounds of two steps while B_0 moves, against loops over layers, tasks and rows, each with its own Adam."""
    ups = [normal(width, R, seed=20 + at).requires_grad_() for at, width in enumerate(WIDTHS)]
    ours = game(ups)
    layers = []
    for width in WIDTHS:
        weight = torch.zeros(3, width, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        layers.append((weight, bias, torch.optim.Adam([weight, bias], lr=0.05)))
    for at, covariance in enumerate(task.covariance for task in two_tasks()):
        torch.testing.assert_close(ours.factors[at] @ ours.factors[at].mT, covariance, rtol=1e-5, atol=1e-6)
    for turn in range(3):
        codes = 2 * normal(3, 9 if turn else 2, R, seed=30 + turn)  # at least 8 of each old task are drawn
        ours.learn(codes)
        sizes = {}
        for step in (2 * turn, 2 * turn + 1):
            noise = torch.randn(2, 3, max(codes.shape[1], 8), R, generator=generator(step)).double()
            for at, (weight, bias, optimizer) in enumerate(layers):
                up = ups[at].detach()
                outputs = []
                for task, known in enumerate(two_tasks()):
                    drawn = [known.mean[at] + ours.factors[task, at] @ e for e in noise[task, at]]
                    outputs.append([up @ z for z in drawn])
                outputs.append([up @ z for z in codes[at]])
                mean_square = sum(sum((h @ h) / len(h) for h in own) / len(own) for own in outputs) / 3
                sizes[at] = math.sqrt(mean_square)
                loss = sum(
                    sum(cross_entropy(weight @ (h / sizes[at]) + bias, torch.tensor(task)) for h in own)
                    / len(own)
                    for task, own in enumerate(outputs)
                )
                optimizer.zero_grad()
                (loss / 3).backward()
                optimizer.step()
        for at, (weight, bias, _) in enumerate(layers):
            g = next(g for g, group in enumerate(ours.groups) if at in group)
            place = ours.groups[g].index(at)
            torch.testing.assert_close(ours.weights[g][place], weight, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(ours.biases[g][place, 0], bias, rtol=1e-6, atol=1e-8)
        total = 0
        for at, (weight, bias, _) in enumerate(layers):
            for z in codes[at]:
                told = (weight.detach() @ (ups[at] @ z / sizes[at]) + bias.detach()).softmax(0)
                total = total - told.log().sum() / 3 / 3 / codes.shape[1]
        found = ours.confusion(codes)
        torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-8)
        assert found > math.log(3) + 1e-3
        gradients = torch.autograd.grad(total, ups)
        torch.testing.assert_close(torch.autograd.grad(found, ups), gradients, rtol=1e-6, atol=1e-8)
        with torch.no_grad():
            for up, gradient in zip(ups, gradients, strict=True):
                up -= 0.3 * gradient


def test_the_confusion_of_a_layer_moves_its_own_shared_expert_alone():
    ups = [normal(width, R, seed=20 + at).requires_grad_() for at, width in enumerate(WIDTHS)]
    codes = normal(3, 9, R, seed=30)
    ours = game(ups)
    ours.learn(codes)
    before = [weight.detach().clone() for weight in ours.weights]
    first = torch.autograd.grad(ours.confusion(codes), ups)
    codes[1] += 1
    second = torch.autograd.grad(ours.confusion(codes), ups)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(before, ours.weights, strict=True))


def test_the_game_goes_on_as_it_was():
    """State taken between two rounds, into another one: the same discriminators to the bit, the same draws after."""
    ups = [normal(width, R, seed=20 + at) for at, width in enumerate(WIDTHS)]
    codes, (ours, other) = normal(3, 9, R, seed=30), (game(ups), game(ups))
    ours.learn(codes)
    other.restore(copy.deepcopy(ours.state()))
    for one in (ours, other):
        one.learn(codes + 1)
    assert ours.state().keys() == other.state().keys() and int(other.state()["discriminator.done"]) == 4
    assert all(torch.equal(value, other.state()[name]) for name, value in ours.state().items())
    assert torch.equal(ours.confusion(codes), other.confusion(codes))


def test_after_the_game_a_fresh_discriminator_tells_the_tasks_half_as_well():
    """What it is for: what the shared expert says has less of the task in it, whoever looks."""
    ups = [normal(width, R, seed=20 + at).requires_grad_() for at, width in enumerate(WIDTHS)]

    def told():
        judge, codes = game([up.detach() for up in ups], steps=60), 3 + normal(3, 64, R, seed=999)
        judge.learn(codes)
        return float(judge.confusion(codes)) - math.log(3)

    before = told()
    ours, optimizer = game(ups, steps=5), torch.optim.SGD(ups, lr=0.05)
    for turn in range(60):
        codes = 3 + normal(3, 16, R, seed=100 + turn)
        ours.learn(codes)
        optimizer.zero_grad()
        ours.confusion(codes).backward()
        optimizer.step()
    assert told() < 0.5 * before


# ---- statistics and the anchor ---------------------------------------------------------------------------------


def test_statistics_are_those_of_the_raw_tokens():
    """Two layers, batches of other lengths and padding, against numpy."""
    gatherer, raw = Gatherer(), {0: [], 1: []}
    draw = np.random.default_rng(0)
    for lengths in ([3, 1, 5], [2, 4], [6]):
        for layer in (1, 0):
            rows_ = [draw.normal(size=(n, R)) + layer for n in lengths]
            raw[layer] += rows_
            padded = np.full((len(lengths), max(lengths), R), 99.0)
            mask = np.zeros(padded.shape[:2], bool)
            for at, row in enumerate(rows_):
                side = slice(0, len(row)) if at % 2 else slice(max(lengths) - len(row), None)
                padded[at, side], mask[at, side] = row, True
            gatherer.add(layer, torch.tensor(padded), torch.tensor(mask))
    found = gatherer.statistics()
    for layer, rows_ in raw.items():
        means, every = np.stack([row.mean(0) for row in rows_]), np.concatenate(rows_)
        np.testing.assert_allclose(found.mean[layer], means.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.covariance[layer], np.cov(means.T), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.moment[layer], every.T @ every / len(every), rtol=1e-5, atol=1e-6)


def uneven(task, count=5):
    return tokens([{**r, "prompt": r["prompt"] * (1 + n % 3)} for n, r in enumerate(rows(count, task))])


@pytest.mark.parametrize("tasks", ["A", "AB"])
def test_a_tasks_statistics_are_of_its_rows_with_its_own_expert(tasks, tmp_path):
    """What training leaves, against each row alone through the trained model, its layers' inputs by hand.

    The second task has the first one's prompts, so that the router would not have picked its expert.
    """
    state = None
    for task in tasks:
        data = [{**row, "task": task} for row in uneven("A")]
        model = adapted(new_model)
        options = {"model": model, "task": task, "method_state": state, "max_steps": 3}
        trainer = plain(tmp_path, [MoECL()], data, learning_rate=0.05, **options)
        trainer.train()
        state = trainer.method_state()
    method, inputs = trainer.methods[0], {name: [] for name in TARGETS}
    method.experts.pin = len(tasks) - 1
    modules = dict(model.get_base_model().named_modules())
    for name in TARGETS:
        modules[name].register_forward_hook(
            lambda m, i, o, n=name: inputs[n].append(i[0][0].double().numpy())
        )
    model.eval()
    with torch.no_grad():
        for row in data:
            model(input_ids=torch.tensor([row["input_ids"]]))
    tensors = state["moe-cl"]["tensors"]
    for at, name in enumerate(TARGETS):
        down = tensors[f"shared.{name}.lora_A.weight"].double().numpy()
        codes = [x @ down.T for x in inputs[name]]
        means, every = np.stack([z.mean(0) for z in codes]), np.concatenate(codes)
        found = {f: tensors[f"statistics.{len(tasks) - 1}.{f}"][at] for f in ("mean", "covariance", "moment")}
        np.testing.assert_allclose(found["mean"], means.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["covariance"], np.cov(means.T), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["moment"], every.T @ every / len(every), rtol=1e-4, atol=1e-5)


def test_drift_is_the_mean_squared_change_of_the_shared_outputs_on_raw_inputs():
    """Two layers, two old tasks, every token of them pushed through B_0 as it was and as it is."""
    downs = [normal(R, 6, seed=1), normal(R, 6, seed=2)]
    starts = [normal(5, R, seed=3), 0.1 * normal(4, R, seed=4)]
    now = [up + 0.2 * normal(*up.shape, seed=5) for up in starts]
    shares = torch.tensor([[0.9, 0.2], [0.4, 0.5]], dtype=torch.float64)  # (tasks, layers)
    inputs = [normal(7, 6, seed=6), 2 * normal(11, 6, seed=7)]  # of each task, its tokens
    seen = []
    for x in inputs:
        codes = [x @ down.T for down in downs]
        moment = torch.stack([z.T @ z / len(z) for z in codes])
        seen.append(CodeStatistics(moment[:, 0], moment, moment))
    changed, usual = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for layer in range(2):
        for task, x in enumerate(inputs):
            for token in x:
                z = shares[task, layer] * downs[layer] @ token
                changed[layer] += ((now[layer] - starts[layer]) @ z).square().sum() / len(x)
                usual[layer] += (starts[layer] @ z).square().sum() / len(x)
    wanted = (changed / (usual + usual.mean() / 100)).mean()
    anchor = Anchor(starts, seen, shares)
    torch.testing.assert_close(anchor.drift(now), wanted, rtol=1e-9, atol=0)
    assert anchor.drift(starts) == 0


# ---- the game in training --------------------------------------------------------------------------------------


def test_the_game_reaches_nothing_but_the_shared_b(tmp_path):
    """The first step's gradients with and without it: the same bits, but for the columns of B_0 in every layer."""
    found = []
    for weight in (0.0, 5.0):
        method, catch = MoECL(adversary=weight, protect=0), Gradients()
        state = stored(kind=torch.float32)
        options = {"model": adapted(new_model), "task": "C", "method_state": state, "max_steps": 1}
        trainer = plain(tmp_path, [method, catch], uneven("C"), lr_scheduler_type="constant", **options)
        trainer.train()
        found.append(catch.found)
    without, with_game = found
    assert without.keys() == with_game.keys() and any("expert_gates" in name for name in without)
    touched = []
    for name, gradient in without.items():
        if "lora_B" in name:
            assert torch.equal(gradient[:, 2:], with_game[name][:, 2:])
            touched.append(not torch.allclose(gradient[:, :2], with_game[name][:, :2], rtol=1e-3))
        else:
            assert torch.equal(gradient, with_game[name]), name
            assert gradient.any() or "lora_A" in name
    assert touched == [True] * len(TARGETS)
