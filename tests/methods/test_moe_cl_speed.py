"""What MoE-CL's speed is measured against computes the same, and so do the two ways of joining experts."""

import pytest
import torch
from benchmarks.moe_cl_reference import two_branches
from tests.methods.test_task_experts import DOWN, Q, V, adapted, double, expert
from tests.training.stream import rows, sft, tokens

from meristem.experts_format import RouterEntry
from meristem.methods.architecture import _layers
from meristem.methods.architecture.experts import Expert, Experts
from meristem.methods.architecture.moe_cl import MoECL


def test_the_reference_of_the_step_time_computes_what_moe_cl_does(tmp_path):
    """Logits, confusion and drift of the second task in float64, away from where training starts."""
    first = sft(tmp_path, [MoECL()], rows(6, "A"), task="A", model=adapted(), max_steps=3)
    first.train()
    state = first.method_state()
    trainer = sft(tmp_path, [MoECL()], rows(6, "B"), task="B", model=first.model, method_state=state)
    (method,), model = trainer.methods, trainer.model.train()
    plain = double()
    game = two_branches(plain, state["moe-cl"])
    draw = torch.Generator().manual_seed(0)

    def noise(like):
        return 0.1 * torch.randn(like.shape, generator=draw, dtype=like.dtype)

    rank, gates = 2, method._gates
    with torch.no_grad():
        for theirs, (name, ours) in zip(game.layers, method._training[2].layers.items(), strict=True):
            up, logits = ours.lora_B["default"].weight, gates.logits[gates.at[name]]
            for part, mine in (
                (theirs.shared_up, up[:, :rank]),
                (theirs.own_up, up[:, rank:]),
                (theirs.theta, logits),
            ):
                change = noise(mine)
                part += change
                mine += change
        method.adversary.sizes = [torch.full_like(size, 0.7) for size in method.adversary.sizes]
        for g, layers in enumerate(method.adversary.groups):
            for n, at in enumerate(layers):
                method.adversary.weights[g][n] += noise(method.adversary.weights[g][n])
                game.discriminators[at].weight.copy_(method.adversary.weights[g][n])

    batch = trainer.data_collator(tokens_of_other_lengths())
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with method.batch({**inputs, "labels": batch["labels"]}):
        ours = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(plain(**inputs).logits[real], ours[real], rtol=1e-6, atol=1e-9)
    codes = torch.stack([method._codes[at] for at in sorted(method._codes)])
    sizes = [torch.tensor(0.7 * layer.scale, dtype=torch.float64) for layer in game.layers]
    confusion = game.confusion(game.pooled(inputs["attention_mask"]), sizes)
    torch.testing.assert_close(
        confusion.double(), method.adversary.confusion(codes).double(), rtol=1e-5, atol=0
    )
    drift = method.anchor.drift(method._ups())
    torch.testing.assert_close(game.drift(), drift, rtol=1e-5, atol=0)
    assert drift > 0.01


def tokens_of_other_lengths():
    return tokens([{**row, "prompt": row["prompt"] * (n + 1)} for n, row in enumerate(rows(3, "B"))])


@pytest.mark.parametrize("kind", ["none", "static", "token"])
@pytest.mark.parametrize("sample", [[0, 1, 2, 1], [2, 2, 0, 0]])
def test_experts_gathered_row_by_row_say_what_all_of_them_joined_say(kind, sample, monkeypatch):
    """Also for a row of no known task, and where a layer lacks the expert of some row."""
    draw = torch.Generator().manual_seed(4)

    def gates(widths):
        shape = (lambda d: (2,)) if kind == "static" else (lambda d: (2, d))
        return {n: torch.randn(shape(d), generator=draw, dtype=torch.float64) for n, d in widths.items()}

    model = double().eval()
    modules = dict(model.named_modules())
    targets = [[Q, V], [Q, DOWN], [V, Q]] if kind == "none" else [[Q, V]] * 3
    three = []
    for at, layers in enumerate(targets):
        one = expert(str(at), at, layers)
        own = gates({n: modules[n].in_features for n in layers}) if kind != "none" else None
        three.append(Expert(one.about, one.factors, one.vector, own))
    shared = expert("shared", 9, [Q, V]) if kind != "none" else None
    router = RouterEntry(mode="top-1", unknown=-1.0)
    attached = Experts(model, router, three, shared=shared)
    ids = torch.randint(3, 250, (5, 12), generator=draw)
    monkeypatch.setattr(attached, "_measured", lambda given, off: routing(sample))
    found, gathered = {}, []
    original = _layers.InUse.gathered
    monkeypatch.setattr(_layers.InUse, "gathered", lambda *a: gathered.append(1) or original(*a))
    with torch.no_grad():
        for long in (1, 100):
            monkeypatch.setattr(_layers, "LONG", long)
            found[long] = model(input_ids=ids).logits
            assert bool(gathered) == (long == 1)
            gathered.clear()
    torch.testing.assert_close(found[1], found[100], rtol=1e-9, atol=1e-12)
    for at in range(5):  # and what the row says alone, where nothing can be mixed up
        monkeypatch.setattr(attached, "_measured", lambda given, off, at=at: routing(sample, at))
        with torch.no_grad():
            alone = model(input_ids=ids[at : at + 1]).logits[0]
        torch.testing.assert_close(found[1][at], alone, rtol=1e-9, atol=1e-12)


def routing(sample, row=None):
    """Of four rows with an expert each, and a fifth of no known task."""
    weights = torch.zeros(5, 3, dtype=torch.float64)
    weights[range(4), sample] = 1.0
    weights = weights if row is None else weights[row : row + 1]
    return _layers.Routing(weights, tuple(weights.any(0).nonzero()[:, 0].tolist()))
