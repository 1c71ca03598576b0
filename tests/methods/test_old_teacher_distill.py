import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.streams import assert_forgets_less
from tests.tiny import new_model
from tests.training.stream import plain, rows, sft, tokens
from tests.training.trainers import make

from meristem.errors import BadInput, Clash
from meristem.methods import parse
from meristem.methods.base import trainable
from meristem.methods.regularization import old_teacher_distill
from meristem.methods.regularization.old_teacher_distill import OldTeacherDistill
from meristem.training.continual import continual

RATE, STEPS, STRENGTH, T, HIDDEN = 0.02, 3, 1.5, 2.0, 0.7


def model_of(kind):
    """ "fresh": a LoRA with B = 0; "continued": one that was trained; "full": all weights."""
    model = new_model()
    if kind == "full":
        return model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that a change of the adapter is felt in the logits
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in trainable(model).items():
            if kind == "continued" and "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def outputs(model, batch):
    """Logits and last hidden states at the positions whose next token is labelled, by Hugging Face's own forward."""
    out = model(input_ids=batch["input_ids"], output_hidden_states=True)
    kept = batch["labels"][:, 1:] != -100
    return out.logits[:, :-1][kept], out.hidden_states[-1][:, :-1][kept], batch["labels"][:, 1:][kept]


def reference(model, batch):
    """Plain gradient descent on cross-entropy + distillation from a deep copy; sums written out."""
    teacher = copy.deepcopy(model).eval()
    for _ in range(STEPS):
        logits, hidden, labels = outputs(model, batch)
        with torch.no_grad():
            old_logits, old_hidden, _ = outputs(teacher, batch)
        p, q = torch.softmax(old_logits / T, -1), torch.softmax(logits / T, -1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        match = (hidden - old_hidden).square().sum(-1).mean() / hidden.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits, labels) + STRENGTH * T**2 * kl + HIDDEN * match
        params = list(trainable(model).values())
        for parameter, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            parameter.data -= RATE * grad
    return {name: p.detach() for name, p in trainable(model).items()}, float(kl.detach())


@pytest.mark.parametrize(
    ("kind", "trainer", "accumulation", "chunk"),
    [("fresh", sft, 2, 1024), ("continued", sft, 1, 3), ("continued", plain, 2, 1024), ("full", sft, 2, 3)],
)
def test_trains_as_a_model_beside_a_copy_of_its_old_self(
    kind, trainer, accumulation, chunk, monkeypatch, tmp_path
):
    monkeypatch.setattr(old_teacher_distill, "CHUNK", chunk)
    data, model = rows(4), model_of(kind)
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    options |= {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "max_steps": STEPS}
    method = OldTeacherDistill(STRENGTH, T, HIDDEN)
    given = data if trainer is sft else tokens(data)
    made = trainer(tmp_path, [method], given, model=copy.deepcopy(model), **options)
    assert bool(method.teacher) == (kind != "fresh")
    batch = next(made.context.batches(data if trainer is sft else tokens(data), batch_size=4))
    expected, kl = reference(model, batch)
    made.train()
    assert kl > 1e-6  # the term did something
    ours = {name: p.detach() for name, p in trainable(made.model).items()}
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    without = trainer(tmp_path, [], given, model=model_of(kind), **options)
    without.train()
    gap = max((ours[name] - p.detach()).abs().max() for name, p in trainable(without.model).items())
    assert gap > 1e-4


def test_the_teacher_has_no_dropout_and_leaves_the_model_as_it_was(tmp_path):
    """A first step is at the teacher's own weights, so all that the term can see is dropout of one of the two."""
    seen = []

    class Spy(OldTeacherDistill):
        def loss(self, step):
            value = super().loss(step)
            modes = {module.training for module in step.model.modules()}
            seen.append((float(value.detach()), modes, step.model.active_adapters))
            return value

    for dropout in (0.0, 0.9):
        lora = LoraConfig(
            r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(new_model(), lora)
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                if "lora_B" in name:
                    parameter.fill_(0.5)
        trainer = sft(tmp_path, [Spy(hidden=1.0)], rows(4), model=model, max_steps=1)
        before = {name: p.data_ptr() for name, p in trainable(trainer.model).items()}
        trainer.train()
        assert {name: p.data_ptr() for name, p in trainable(trainer.model).items()} == before
    (still, modes, active), (shaken, *_) = seen
    assert abs(still) < 1e-6 < 1e-3 < shaken and modes == {True} and active == ["default"]


def test_forgets_less_than_sequential_fine_tuning(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "claims"
    assert_forgets_less(lambda: [OldTeacherDistill()], folder, first=False)


@pytest.mark.parametrize("options", [{}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}])
def test_distils_on_the_completions_of_preference_pairs(options, tmp_path):
    logged = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.1}
    trainer = make("dpo", tmp_path, [OldTeacherDistill()], max_steps=2, **logged, **options)
    trainer.train()
    values = [
        e["old-teacher-distill/loss"] for e in trainer.state.log_history if "old-teacher-distill/loss" in e
    ]
    assert abs(values[0]) < 1e-8 < 1e-7 < values[1]


def test_logits_are_those_of_the_model_with_a_scale_and_a_soft_cap():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    size = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    capped = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=0.3))
    for model in (capped, CohereForCausalLM(CohereConfig(**size, logit_scale=0.1))):
        out = model.eval()(input_ids=torch.arange(5)[None], output_hidden_states=True)
        found = old_teacher_distill._logits(model, out.hidden_states[-1])
        torch.testing.assert_close(found, out.logits)


def test_what_cannot_work_is_refused_by_name(tmp_path):
    method = OldTeacherDistill()
    with pytest.raises(Clash, match="old-teacher-distill works in stages ca, cit, cpt, not in rl"):
        continual(type("GRPOTrainer", (), {}), [method])
    with pytest.raises(
        Clash, match=r"old-teacher-distill needs next-token distributions over a labelled completion"
    ):
        make("reward", tmp_path, [method])
    for text, says in (
        ("strength=-1", "strength=-1"),
        ("temperature=0", "temperature=0"),
        ("hidden=x", "'x'"),
    ):
        with pytest.raises(BadInput, match=says):
            parse(f"old-teacher-distill:{text}")
