"""O-LoRA: against LoRAs kept apart, frozen to the bit, one plain PEFT adapter, and its claim."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.methods.adapters import assert_forgets_less, assert_resumes, first, second
from tests.tiny import new_model
from tests.training.stream import plain, rows, sft, tokens
from torch.func import functional_call

from meristem.errors import BadInput, Clash
from meristem.methods import Context, build
from meristem.methods.architecture.o_lora import OLoRA
from meristem.methods.base import trainable

LORA = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def adapted(trained=True, **options):
    """The tiny model with a LoRA that changes it already, or with a fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(new_model(), LoraConfig(**{**LORA, **options}))
        for name, parameter in model.named_parameters():
            if trained and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def state(*ranks):
    return {"o-lora": {"tensors": {}, "json": {"ranks": list(ranks)}}}


def parts(model):
    """{layer: (A, B)} of the adapter."""
    found = {name: p.detach().clone() for name, p in trainable(model).items()}
    return {
        n.split(".lora_A")[0]: (p, found[n.replace("lora_A", "lora_B")])
        for n, p in found.items()
        if "lora_A" in n
    }


def test_an_update_is_that_of_loras_kept_apart(tmp_path):
    model, data, settings = (
        adapted(),
        tokens(rows(4)),
        {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0},
    )
    settings |= {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = plain(tmp_path, [OLoRA(strength=0.1)], data, model=model, method_state=state(1, 1), **settings)
    start = parts(model)
    trainer.train()
    base = dict(new_model().named_parameters())
    name_of = {layer: layer.removeprefix("base_model.model.") + ".weight" for layer in start}
    new = {layer: [a[2:].clone(), b[:, 2:].clone()] for layer, (a, b) in start.items()}
    batch = {key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "labels")}
    for _ in range(2):
        leaves = [p.requires_grad_() for pair in new.values() for p in pair]
        weights, penalty = dict(base), 0.0
        for layer, (a, b) in start.items():
            loras = [(a[:1], b[:, :1]), (a[1:2], b[:, 1:2]), new[layer]]
            weights[name_of[layer]] = base[name_of[layer]] + 3 * sum(up @ down for down, up in loras)
            for old, _ in loras[:2]:
                penalty = penalty + sum(abs(row @ column) for row in old for column in new[layer][0])
        value = functional_call(new_model(), weights, (), batch).loss + 0.1 * penalty
        gradients = iter(torch.autograd.grad(value, leaves))
        new = {layer: [(p - 0.5 * next(gradients)).detach() for p in pair] for layer, pair in new.items()}
    for layer, (a, b) in parts(model).items():
        torch.testing.assert_close(a[2:], new[layer][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b[:, 2:], new[layer][1], rtol=1e-4, atol=1e-6)
        assert not torch.equal(b[:, 2:], start[layer][1][:, 2:])


def test_the_new_lora_begins_without_effect_and_the_same_everywhere():
    model, before = adapted(), new_model()
    ids = torch.arange(3, 13)[None]
    model.eval()
    old, noise = model(input_ids=ids).logits, torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        grown = copy.deepcopy(model)
        OLoRA().prepare_model(grown, Context("b", seed=seed))
        torch.testing.assert_close(grown(input_ids=ids).logits, old, rtol=1e-5, atol=1e-6)
        drawn.append(parts(grown))
    assert torch.equal(noise, torch.get_rng_state()) and not torch.equal(before(input_ids=ids).logits, old)
    for layer, (a, b) in parts(model).items():
        one, again, other = (found[layer][0] for found in drawn)
        assert a.shape == (2, a.shape[1]) and one.shape == (4, a.shape[1]) and torch.equal(one[:2], a)
        assert torch.equal(one, again) and not torch.equal(one, other) and not drawn[0][layer][1][:, 2:].any()
        assert one[2:].abs().max() <= a.shape[1] ** -0.5 and torch.equal(drawn[0][layer][1][:, :2], b)
    config = grown.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 12)


def test_old_loras_keep_every_bit_and_the_penalty_turns_the_new_one_away(tmp_path):
    ends = {}
    for strength in (0.0, 5.0):
        model = adapted(lora_dropout=0.1)
        old = parts(model)
        options = {"max_steps": 12, "weight_decay": 0.3, "learning_rate": 2e-2, "task": "B", "bf16": True}
        sft(tmp_path, [OLoRA(strength, rank=3)], rows(4), model=model, **options).train()
        for layer, (a, b) in parts(model).items():
            assert torch.equal(a[:2], old[layer][0]) and torch.equal(b[:, :2], old[layer][1])
            assert a.shape[0] == b.shape[1] == 5 and b[:, 2:].abs().max() > 1e-3
        ends[strength] = sum(float((a[:2] @ a[2:].T).abs().sum()) for a, _ in parts(model).values())
    assert ends[5.0] < 0.2 * ends[0.0]


def test_a_first_task_is_plain_lora(tmp_path):
    plain_lora, ours = adapted(trained=False), adapted(trained=False)
    method = OLoRA()
    for methods, model in (([], plain_lora), ([method], ours)):
        sft(tmp_path, methods, rows(4), model=model, max_steps=3).train()
    torch.testing.assert_close(trainable(ours), trainable(plain_lora), rtol=0, atol=0)
    assert method.state_dict()["json"] == {"ranks": [2]}


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits_as_one_adapter(tmp_path):
    assert assert_resumes(lambda: [OLoRA()], tmp_path)["o-lora"]["json"] == {"ranks": [4, 4]}
    checkpoint = tmp_path / "cut" / "checkpoint-4"  # killed in the middle, it is a plain adapter as well
    assert not [p for p in checkpoint.rglob("adapter*") if p.parent != checkpoint]
    loaded = PeftModel.from_pretrained(new_model(), str(checkpoint))
    assert loaded.peft_config["default"].r == 8
    assert {layer.scaling["default"] for layer in loaded.modules() if hasattr(layer, "lora_A")} == {2.0}


def test_the_next_update_in_a_new_process_is_the_one_in_memory(tmp_path):
    """Of GPM and MoCL as well: a process takes seconds to start."""
    made = {"o-lora": {}, "gpm": {"threshold": 0.8}, "mocl": {}}
    here = {}
    for name, arguments in made.items():
        model, kept = first(tmp_path / name, [build(name, arguments)])
        trainer = second(
            tmp_path / name, tmp_path / "here", [build(name, arguments)], model=model, method_state=kept
        )
        trainer.train()
        here[name] = {n.replace(".default", ""): p.detach() for n, p in trainable(trainer.model).items()}
    code = f"""
from pathlib import Path
from tests.methods.adapters import second
from meristem.methods import build
for name, arguments in {made!r}.items():
    folder = Path({str(tmp_path)!r}, name)
    trainer = second(folder, folder / "there", [build(name, arguments)])
    trainer.train()
    trainer.model.save_pretrained(str(folder / "end"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for name, ours in here.items():
        there = load_file(tmp_path / name / "end" / "adapter_model.safetensors")
        torch.testing.assert_close(there, ours, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (new_model, "none is in training"),
        (lambda: get_peft_model(new_model(), IA3Config(task_type="CAUSAL_LM")), "none is in training"),
        (lambda: adapted(use_rslora=True), "use_rslora"),
        (lambda: adapted(use_dora=True), "no part of a LoRA"),
        (lambda: adapted(modules_to_save=["norm"]), "no part of a LoRA"),
        (lambda: adapted(target_modules=["embed_tokens"]), "none is in training"),
        (lambda: adapted(rank_pattern={"q_proj": 3}), "different rank"),
    ],
)
def test_other_models_are_refused_by_name(model, says):
    with pytest.raises(Clash, match=f"o-lora.*{says}"):
        OLoRA().prepare_model(model(), Context("b"))


def test_a_state_of_another_adapter_and_wrong_values_are_refused():
    method = OLoRA()
    method.load_state_dict(state(2, 2)["o-lora"])
    with pytest.raises(BadInput, match="for an adapter of rank 4, this one has 2"):
        method.prepare_model(adapted(), Context("b"))
    with pytest.raises(BadInput, match="broken alpha"):
        OLoRA(rank=3).prepare_model(adapted(lora_alpha=1), Context("b"))
    for wrong in ({"strength": -1}, {"strength": float("nan")}, {"rank": 0}, {"rank": 1.5}):
        with pytest.raises(BadInput, match=f"o-lora: {next(iter(wrong))}="):
            build("o-lora", wrong)


def test_it_forgets_less_than_one_lora_trained_on(tmp_path):
    assert_forgets_less(lambda: [OLoRA()], tmp_path, rank=4)
