"""Distillation to one plain LoRA: what it reaches where an equal one exists, what it says where none does."""

from __future__ import annotations

import math
import random

import pytest
import torch
from peft import PeftModel
from tests.methods.test_moe_cl_published import Lora, gates, lora
from tests.tiny import new_model

from meristem.errors import BadInput, NonFiniteLoss
from meristem.methods.architecture.moe_cl.distill import distill
from meristem.methods.architecture.moe_cl.ffn import FfnMixtures


def rows(seed, count):
    """Random tokens, every other row with a prompt that is not to be predicted."""
    draw = random.Random(seed)
    made = []
    for at in range(count):
        ids = [draw.randrange(40, 56) for _ in range(draw.randrange(5, 9))]
        made.append({"input_ids": ids} | ({"labels": [-100] * 3 + ids[3:]} if at % 2 else {}))
    return made


TRAIN, HELD = rows(0, 48), rows(1, 10)


def sharp():
    """The tiny model, surer of what comes next than random weights are."""
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(8)
    return model


def merged(expert):
    """A model that is the base with one LoRA in its weights."""
    model = sharp()
    with torch.no_grad():
        for name, (down, up) in expert.factors.items():
            model.get_submodule(name).weight += expert.scale * (up @ down).float()
    return model.eval()


def part(expert, share, rank=None):
    """``share`` of B, and no more than ``rank`` of the rank."""
    cut = {n: (a[:rank], share * b[:, :rank]) for n, (a, b) in expert.factors.items()}
    return Lora(cut, expert.scale)


def by_hand(teacher, student, rows):
    """KL(teacher || student), agreement and count, row by row and token by token."""
    total, same, count = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (of(ids).double().softmax(-1)[0] for of in (teacher, student))
        for at in range(ids.shape[1] - 1):
            if row.get("labels", row["input_ids"])[at + 1] == -100:
                continue
            total += sum(p[at, k] * (p[at, k] / q[at, k]).log() for k in range(p.shape[1])).item()
            same += int(p[at].argmax() == q[at].argmax())
            count += 1
    return total / count, same / count, count


def test_a_teacher_that_is_a_lora_is_met():
    """From its own factors at once; from a part of them, of the same rank or a higher one, nearly."""
    own = lora(2)
    teacher = merged(own)

    def fitted(start, **options):
        return distill(sharp(), lambda batch: teacher(**batch).logits, TRAIN, HELD, start, **options)

    exact = fitted(own, steps=1)
    assert exact.start.kl < 1e-9 and exact.start.agreement == 1.0
    for start, rank, rate, left in ((part(own, 0.5), None, 3e-3, 0.1), (part(own, 1, rank=2), 5, 1e-2, 0.4)):
        found = fitted(start, rank=rank, steps=60, batch_size=12, learning_rate=rate)
        assert found.rank == (rank or 3) and found.alpha == 2.0 * found.rank
        assert found.fit.kl < left * found.start.kl and found.fit.agreement > found.start.agreement
        assert all(len(a) == found.rank and b.shape[1] == found.rank for a, b in found.factors.values())


def test_a_mixture_is_approached_and_what_is_left_is_told(tmp_path):
    """The teacher hangs on the model that the student grows on; the saved adapter in plain PEFT has the fit reported."""
    model = sharp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared, own = (
        Lora({n: (a.float(), b.float()) for n, (a, b) in lora(k).factors.items()}, 2.0) for k in (1, 2)
    )
    gate = {name: value.float() for name, value in gates().items()}
    mixtures = FfnMixtures(model, gate, shared=shared, experts=[own])
    halves = {n: (torch.cat([a, own.factors[n][0]]), torch.cat([b, own.factors[n][1]], 1) / 2)
              for n, (a, b) in shared.factors.items()}  # fmt: skip

    def teacher(batch):
        with mixtures.switched(True):
            mixtures.route([0] * len(batch["input_ids"]))
            return model(**batch).logits

    options = {"steps": 40, "batch_size": 12, "learning_rate": 1e-2}
    with mixtures.switched(False):
        found, again = (distill(model, teacher, TRAIN, HELD, Lora(halves, 2.0), **options) for _ in range(2))
    assert found.start.kl > 1e-3 and found.fit.kl < 0.7 * found.start.kl
    assert found.fit == again.fit and all(
        torch.equal(x, y)
        for n in found.factors
        for x, y in zip(found.factors[n], again.factors[n], strict=True)
    )
    found.save(tmp_path / "adapter", "A")
    loaded = PeftModel.from_pretrained(sharp(), str(tmp_path / "adapter")).eval()
    measured = by_hand(
        lambda ids: teacher({"input_ids": ids}), lambda ids: loaded(input_ids=ids).logits, HELD
    )
    assert measured == pytest.approx((found.fit.kl, found.fit.agreement, found.fit.positions), rel=1e-4)
    mixtures.remove()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_distilled_is_refused_before_it_costs_anything():
    def never(batch):
        raise AssertionError("the teacher was asked")

    row, start = {"input_ids": [5, 6, 7]}, lora(2)
    for given, says in (
        ({"rows": []}, "rows is empty"),
        ({"held_out": []}, "held_out is empty"),
        ({"rows": [row, {"input_ids": [4]}]}, "row 1 of rows has no token to predict"),
        ({"rows": [{**row, "labels": [5, -100, -100]}]}, "row 0 of rows has no token to predict"),
        (
            {"held_out": [row, {"input_ids": [5, 6, 8]}], "rows": [row]},
            "1 of 2 held-out rows are trained on too",
        ),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"rank": 2}, "rank=2 is below that of its start, 3"),
    ):
        with pytest.raises(BadInput, match=says):
            distill(sharp(), never, **{"rows": TRAIN, "held_out": HELD, "start": start, **given})
    model = sharp()
    with pytest.raises(BadInput, match=r"the teacher's logits are \(8, 3\)"):
        distill(model, lambda batch: torch.zeros(8, 3), TRAIN, HELD, start)
    with pytest.raises(NonFiniteLoss):
        distill(model, lambda batch: model(**batch).logits * math.nan, TRAIN, HELD, start)
    assert not any("lora" in name for name, _ in model.named_modules())
