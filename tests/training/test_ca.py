"""Stage ``ca``: the reference is the version that is continued, and nothing of it is saved or trained."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from peft import PeftModel
from tests import acme
from tests.tiny import tiny_model

import meristem as ms
from meristem.config import MethodConfig, Preference, Recipe, resolve_recipe
from meristem.engine.load import load_for_training
from meristem.errors import BadInput, Clash
from meristem.methods.base import trainable
from meristem.training import ca
from meristem.training.adapters import trainable_model

ROWS = [
    {"id": f"r{n}", "task": "polite", "prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}
    for n in range(8)
]
RECIPE = {
    "stage": "ca",
    "dtype": "float32",
    "batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.01,
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parent(model, tmp_path_factory):
    """An adapter that answers quite otherwise than its base."""
    folder = tmp_path_factory.mktemp("parent")
    made, tokenizer = trainable_model(Recipe(**RECIPE), model, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(made).items():
            if "lora_B" in name:
                parameter.normal_(0, 4.0)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(model, parent, output, *, rows=ROWS, history=None, **settings):
    return ca.build_trainer(
        Recipe(**{**RECIPE, **settings}),
        folder=parent or model,
        base_folder=model if parent else None,
        rows=rows,
        history=history or {},
        method_state=None,
        output=output,
        callbacks=[],
    )


def weights(trainer, adapter):
    return {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if f".{adapter}." in name
    }


def test_the_reference_is_the_parent_and_not_the_bare_base(model, parent, tmp_path):
    trainer = build(model, parent, tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs.pop("meristem_tags", None)
    with torch.no_grad():
        reference = trainer.compute_ref_log_probs(trainer.model, inputs)
        own = PeftModel.from_pretrained(trainable_model(Recipe(**RECIPE), model, None)[0].unload(), parent)
        parents = own(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    labels, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
    expected = (parents[:, :-1].gather(2, labels[..., None])[..., 0] * mask).sum(1)
    found = torch.cat([part.reshape(-1) for part in reference[:2]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    frozen = weights(trainer, "ref")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same at first
    assert losses[-1] < losses[0]
    after = weights(trainer, "ref")
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(".ref." in name for name in trainer.parameters())


@pytest.mark.parametrize("with_adapter", [True, False])
def test_resumed_the_reference_is_still_the_parent(with_adapter, model, parent, tmp_path):
    """Also where the parent has no adapter, so that the reference is the bare base."""
    settings = {"max_steps": 3, "checkpoint_steps": 2}
    folder = parent if with_adapter else None
    whole = build(model, folder, tmp_path, **settings)
    inputs = whole._prepare_inputs(next(iter(whole.get_train_dataloader())))
    inputs = {name: value for name, value in inputs.items() if not name.startswith("meristem")}
    before = log_probs(folder or model, model if with_adapter else None, inputs)
    whole.train()
    resumed = build(model, folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    for adapter in ("default", "ref"):
        expected, found = weights(whole, adapter), weights(resumed, adapter)
        assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    for trainer in (whole, resumed):
        found = torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))
        torch.testing.assert_close(found, before, atol=1e-4, rtol=1e-5)
        with torch.no_grad():
            policy = sums(trainer.model, inputs)
        assert (policy - before).abs().max() > 0.01  # it moved, the reference did not


def test_in_a_workspace_the_reference_is_the_champion_whatever_stage_made_it(released, copy, tmp_path):
    """``support@v2`` carries an adapter that stage cit trained; its rows are no pairs and do not get in the way."""
    ws = ms.Workspace.open(copy(released), actor="kim")
    pairs = [{**row, "task": "b"} for row in ROWS]  # a task that a suite tests
    ws.add_data("polite", acme.lines(tmp_path / "polite.jsonl", pairs))
    made = ws.update(
        "support", data=["polite"], recipe={"stage": "ca", "max_steps": 2, "learning_rate": 0.001}
    )
    first = made.outcome.curve[0]["loss"]
    assert first == pytest.approx(math.log(2), abs=1e-5)  # only of the champion itself are all ratios 1
    ws.close()


def log_probs(folder, base, inputs):
    """log p(answer | prompt) of the chosen, then the rejected answers, under a version loaded from its folder."""
    version, _ = load_for_training(folder, base, "float32", "cpu")
    with torch.no_grad():
        return sums(version.eval(), inputs)


def sums(version, inputs):
    logits = version(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    labels, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
    return (logits[:, :-1].gather(2, labels[..., None])[..., 0] * mask).sum(1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


B, E = 0.3, 0.2
# u, v: log ratios of the chosen and the rejected answer; m, n: their tokens
FAMILY = {
    "sigmoid": lambda u, v, m, n: -math.log(sigmoid(B * (u - v))),
    "sigmoid_norm": lambda u, v, m, n: -math.log(sigmoid(B * (u / m - v / n))),
    "hinge": lambda u, v, m, n: max(0, 1 - B * (u - v)),
    "ipo": lambda u, v, m, n: (u / m - v / n - 1 / (2 * B)) ** 2,
    "robust": lambda u, v, m, n: (
        (E * math.log(sigmoid(B * (v - u))) - (1 - E) * math.log(sigmoid(B * (u - v)))) / (1 - 2 * E)
    ),
    "exo_pair": lambda u, v, m, n: sum(
        q * math.log(q / p) for q, p in ((sigmoid(B * (u - v)), 1 - E), (sigmoid(B * (v - u)), E))
    ),
    "nca_pair": lambda u, v, m, n: (
        -math.log(sigmoid(B * u)) - math.log(sigmoid(-B * u)) / 2 - math.log(sigmoid(-B * v)) / 2
    ),
    "bco_pair": lambda u, v, m, n: -math.log(sigmoid(B * u)) - math.log(sigmoid(-B * v)),
    "sppo_hard": lambda u, v, m, n: (u - 0.5 / B) ** 2 + (v + 0.5 / B) ** 2,
    "apo_zero": lambda u, v, m, n: 1 - sigmoid(B * u) + sigmoid(B * v),
    "apo_down": lambda u, v, m, n: sigmoid(B * u) + 1 - sigmoid(B * (u - v)),
    "discopop": lambda u, v, m, n: (
        math.exp(-B * (u - v)) * sigmoid(B * (u - v) / 0.05)
        - math.log(sigmoid(B * (u - v))) * (1 - sigmoid(B * (u - v) / 0.05))
    ),
}


def test_every_loss_of_the_family_is_its_formula_against_the_parent(model, parent, tmp_path):
    assert {*FAMILY} == {*get_args(Preference.model_fields["loss"].annotation)}
    for loss, formula in FAMILY.items():
        smoothing = E if loss in ("robust", "exo_pair") else 0.0
        preference = {"loss": loss, "beta": B, "label_smoothing": smoothing}
        trainer = build(model, parent, tmp_path, preference=preference, rows=ROWS[:4])
        with torch.no_grad():
            for name, parameter in trainer.parameters().items():
                if "lora_B" in name:  # so that policy and reference differ, the pairs from each other too
                    parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            inputs = {name: value for name, value in inputs.items() if not name.startswith("meristem")}
            found = float(trainer.compute_loss(trainer.model, dict(inputs)))
            ratios = (sums(trainer.model, inputs) - log_probs(parent, model, inputs)).chunk(2)
        tokens = inputs["completion_mask"].sum(1).chunk(2)
        pairs = list(zip(*(part.tolist() for part in (*ratios, *tokens)), strict=True))
        assert len(pairs) == 4 and min(abs(u - v) for u, v, *_ in pairs) > 0.01
        assert found == pytest.approx(sum(formula(*pair) for pair in pairs) / 4, rel=1e-3), loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "robust"}, "loss robust needs label_smoothing above 0"),
        ({"loss": "exo_pair"}, "loss exo_pair needs label_smoothing"),
        ({"label_smoothing": 0.1}, "loss sigmoid has no label_smoothing"),
        (
            {"loss": "robust", "label_smoothing": 0.5},
            r"recipe\.preference\.label_smoothing: .*less than 0\.5",
        ),
        ({"beta": 0}, r"recipe\.preference\.beta: .*greater than 0"),
        ({"loss": "aot"}, r"recipe\.preference\.loss: "),
        ({"gamma": 1}, r"recipe\.preference\.gamma: unknown key"),
    ],
)
def test_a_preference_that_cannot_be_meant_is_refused_when_it_is_read(fields, message):
    with pytest.raises(BadInput, match=message) as refusal:
        resolve_recipe({"stage": "ca", "preference": fields})
    assert "\n" not in str(refusal.value)
    with pytest.raises(BadInput, match="preference is the loss of stage ca"):
        resolve_recipe({"preference": {"beta": 0.2}})
    kept = resolve_recipe({"stage": "ca", "preference": {"beta": 0.2}})
    assert Recipe.from_document(kept.document()) == kept and kept.document()["preference"]["beta"] == 0.2
    assert "preference" not in Recipe(stage="ca").document()


def test_fisher_of_a_pair_is_that_of_its_chosen_answer(model, parent, tmp_path):
    """Against squared gradients of log p(chosen | prompt) from the chat template, without any trainer."""
    rows = ROWS[:3]
    ewc = [MethodConfig(name="ewc", arguments={"samples": 3})]
    trainer = build(model, parent, tmp_path, rows=rows, methods=ewc, max_steps=1, learning_rate=1e-12)
    trainer.train()
    found = trainer.method_state()["ewc"]["tensors"]
    version, tokenizer = load_for_training(parent, model, "float32", "cpu")
    params, expected = trainable(version), {}
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        start = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False))
        tokens = torch.tensor([whole])
        likely = version.eval()(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
        total = likely.gather(1, tokens[0, start:, None]).sum()
        for name, grad in zip(params, torch.autograd.grad(total, list(params.values())), strict=True):
            expected[name] = expected.get(name, 0) + grad.square() / len(rows)
    assert {f"fisher.{name}" for name in expected} == {name for name in found if name.startswith("fisher.")}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"fisher.{name}"], value, rtol=1e-3, atol=1e-6 * float(value.max()))


def test_history_of_other_stages_is_left_out(model, tmp_path):
    old = [{"id": f"old{n}", "task": "brief", "prompt": "a", "completion": "b"} for n in range(4)]
    pairs = [{**row, "id": f"old-{row['id']}", "task": "kind"} for row in ROWS[:2]]
    replay = [MethodConfig(name="experience-replay", arguments={"ratio": 0.5})]
    trainer = build(model, None, tmp_path, history={"brief": old, "kind": pairs}, methods=replay)
    assert {*trainer.train_dataset["task"]} == {"polite", "kind"}


def test_without_the_parents_adapter_the_first_loss_would_differ(model, parent, tmp_path):
    """What TRL does without the copy, so that the test above means something."""
    trainer = build(model, parent, tmp_path)
    trainer.model.delete_adapter("ref")
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first - math.log(2)) > 0.01


def test_replay_mixes_pairs_and_o_lora_is_refused_by_name(model, tmp_path):
    old = [{**row, "id": f"old-{row['id']}", "task": "brief"} for row in ROWS]
    replay = [MethodConfig(name="experience-replay", arguments={"ratio": 0.5})]
    trainer = build(model, None, tmp_path, history={"brief": old}, methods=replay)
    assert sorted(set(trainer.train_dataset["task"])) == ["brief", "polite"]
    assert len(trainer.train_dataset) == 16
    with pytest.raises(Clash, match="method o-lora works in stages cit, cpt, not in ca"):
        build(model, None, tmp_path, methods=[MethodConfig(name="o-lora")])


def test_rows_that_would_be_cut_or_do_not_fit_are_refused(model, tmp_path):
    rows = [*ROWS, {**ROWS[0], "id": "long", "rejected": "n" * 90}]
    with pytest.raises(BadInput, match=r"1 rows are longer than max_length 100, .*: long \("):
        build(model, None, tmp_path, rows=rows, max_length=100)
    with pytest.raises(BadInput, match="row x: stage ca needs prompt, chosen and rejected"):
        build(model, None, tmp_path, rows=[{"id": "x", "task": "t", "prompt": "a", "completion": "b"}])
    tie = {**ROWS[0], "id": "tie", "rejected": ROWS[0]["chosen"]}
    with pytest.raises(BadInput, match="row tie: chosen and rejected are the same answer"):
        build(model, None, tmp_path, rows=[*ROWS, tie])
