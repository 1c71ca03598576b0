"""``lean`` leaves out work and nothing else: the trainer's own losses and weights, on every path."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob as kernel
import trl.trainer.utils as fused
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model, tiny_config
from tests.training.stream import plain, rows, sft, tokens
from transformers import LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from meristem.config import Recipe
from meristem.methods import build
from meristem.training import _lean

gc.freeze()  # every train() ends in gc.collect(), which would walk all of torch and TRL

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
UNEQUAL = [dict(row, prompt=row["prompt"] + "x" * 3 * at) for at, row in enumerate(rows(6))]
TEXTS = [{"id": f"t{n}", "task": "A", "text": f"some words {n * 'and more '}"} for n in range(6)]


def lora(**options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(new_model(), LoraConfig(**LORA, **options, task_type="CAUSAL_LM"))


def untied() -> Any:
    """A head of its own with a bias, and logits that are scaled and capped as in Cohere and Gemma 2."""
    config = tiny_config()
    config.tie_word_embeddings = False
    config.logit_scale, config.final_logit_softcapping = 3.0, 2.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LlamaForCausalLM(config)
        model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    return model


def frozen_head() -> Any:
    model = untied()
    model.lm_head.requires_grad_(False)
    return model


CASES: dict[str, tuple[Any, list[dict[str, Any]], dict[str, Any]]] = {
    "lora, rows of unequal length": (lora, UNEQUAL, {}),
    "all weights, head tied": (new_model, UNEQUAL, {}),
    "a head of its own, bias, scale and cap": (untied, UNEQUAL, {}),
    "the same, head frozen": (frozen_head, UNEQUAL, {}),
    "accumulation": (lora, UNEQUAL, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}),
    "no accumulation, one row": (lora, UNEQUAL, {"per_device_train_batch_size": 1}),
    "gradient checkpointing": (lora, UNEQUAL, {"gradient_checkpointing": True}),
    "text, every token labelled": (lora, TEXTS, {}),
    "text, packed": (lora, TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "dft": (lora, UNEQUAL, {"loss_type": "dft"}),
    "label smoothing": (lora, UNEQUAL, {"label_smoothing_factor": 0.1}),
    "autocast": (lora, UNEQUAL, {"bf16": True}),
    "autocast, checkpointing": (lora, UNEQUAL, {"bf16": True, "gradient_checkpointing": True}),
    "autocast, dropout": (lambda: lora(lora_dropout=0.3), UNEQUAL, {"bf16": True}),
    "autocast, DoRA": (lambda: lora(use_dora=True), UNEQUAL, {"bf16": True}),
}


def trained(folder: Any, lean: bool, make: Any, data: Any, options: dict[str, Any]) -> Any:
    settings = {"max_steps": 2, "logging_strategy": "steps", "logging_steps": 1, "optim": "sgd"}
    model = make()
    if options.get("bf16") and hasattr(
        model, "peft_config"
    ):  # as the stages train: bf16 weights, fp32 factors
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    trainer = sft(folder, [], data, model=model, **{**settings, **options})
    trainer.lean = lean
    trainer.train()
    return trainer


def history(trainer: Any) -> list[tuple[float, ...]]:
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [tuple(entry[k] for k in keys) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_the_trainers_own_path(
    case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lean, "CHUNK", 5)  # more labelled positions than one chunk holds
    ours, theirs = (trained(tmp_path, lean, *CASES[case]) for lean in (True, False))
    assert len(history(ours)) == 2
    for mine, wanted in zip(history(ours), history(theirs), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    wanted_weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, wanted_weights[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_labelled_tokens(tmp_path: Any) -> None:
    trainer = sft(tmp_path, [], UNEQUAL, model=lora())
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@contextmanager
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many positions each tile of logits holds, in both passes."""
    found: list[int] = []
    with monkeypatch.context() as patched:
        for name in ("_forward_tile", "_backward_tile"):

            def counted(tile: Any, *args: Any, of: Any = getattr(kernel, name), **kwargs: Any) -> Any:
                found.append(len(tile))
                return of(tile, *args, **kwargs)

            patched.setattr(kernel, name, counted)
        yield found


def test_only_labelled_positions_are_projected_a_chunk_at_a_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lean, "CHUNK", 5)
    batch = next(iter(sft(tmp_path, [], UNEQUAL, model=lora()).get_train_dataloader()))
    everywhere = batch["input_ids"][:, 1:].numel()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert 5 < labelled < everywhere / 3
    with tiles(monkeypatch) as lean:
        ours = trained(tmp_path, True, lora, UNEQUAL, {"max_steps": 1})
    with tiles(monkeypatch) as whole:
        trained(tmp_path, False, lora, UNEQUAL, {"max_steps": 1})
    assert ours.not_lean == []
    assert sum(lean) == 2 * labelled and max(lean) == 5
    assert sum(whole) == 2 * everywhere


def test_a_batch_without_labels_gives_a_zero_that_can_be_differentiated(tmp_path: Any) -> None:
    trainer = sft(tmp_path, [], rows(2), model=lora())
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert float(loss.detach()) == 0.0


def saved_bytes(trainer: Any) -> int:
    """Bytes that one forward keeps for its backward, each storage once, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = next(iter(trainer.get_train_dataloader()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with trainer.compute_loss_context_manager(), torch.autocast("cpu", torch.bfloat16):
            loss = trainer.compute_loss(trainer.model, dict(batch))
        assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)


def test_under_autocast_inputs_of_lora_are_kept_once(tmp_path: Any) -> None:
    trainer = trained(tmp_path, True, lora, UNEQUAL, {"bf16": True, "max_steps": 1})
    copied = saved_bytes(trainer)
    with _lean.uncopied_inputs(trainer.model):
        once = saved_bytes(trainer)
    assert once < 0.9 * copied
    assert all("_cast_input_dtype" not in vars(layer) for layer in trainer.model.modules())


def test_outside_autocast_inputs_are_cast_as_peft_does(tmp_path: Any) -> None:
    model = lora().bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    ids = torch.tensor([[3, 4, 5]])
    wanted = model(ids).logits
    with _lean.uncopied_inputs(model):
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize(
    ("case", "said"),
    [("label smoothing", "reads every logit"), ("autocast, dropout", "LoRA"), ("autocast, DoRA", "LoRA")],
)
def test_what_is_left_to_the_trainer_is_said(case: str, said: str, tmp_path: Any) -> None:
    make, data, options = CASES[case]
    (line,) = sft(tmp_path, [], data, model=make(), **options).not_lean
    assert said in line


def test_a_loss_of_the_users_own_is_left_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "meristem.training")
    smoother = LabelSmoother(epsilon=0.2)

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return smoother(outputs, labels, shift_labels=True)

    trainer = sft(tmp_path, [], UNEQUAL, model=lora())
    trainer.compute_loss_func = own
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(
        found, own(trainer.model(batch["input_ids"]), batch["labels"]), rtol=0, atol=1e-5
    )
    assert "compute_loss_func" in _lean.report(trainer)[0]
    assert "compute_loss_func" in caplog.text


def test_a_trainer_without_the_fused_head_trains_as_before(tmp_path: Any) -> None:
    trainer = plain(tmp_path, [], tokens(rows()), max_steps=1)
    assert "without TRL's fused head" in trainer.not_lean[0]
    trainer.train()


@pytest.mark.parametrize("name", ["_use_triton", "_ChunkedLogProbFunction"])
def test_a_trl_without_the_names_keeps_its_own_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {key: getattr(fused, key) for key in ("_use_triton", "_ChunkedLogProbFunction") if key != name}
    monkeypatch.delattr(fused, name)
    with _lean.labelled_positions(torch.device("cpu")):
        assert not hasattr(fused, name)
        assert all(getattr(fused, key) is value for key, value in before.items())


def test_compilers_and_triton_keep_trls_path_and_its_names_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = fused._ChunkedLogProbFunction
    with _lean.labelled_positions(torch.device("xla")):
        assert fused._ChunkedLogProbFunction is function
    with pytest.raises(KeyError), _lean.labelled_positions(torch.device("cpu")):
        assert fused._ChunkedLogProbFunction is not function
        raise KeyError
    assert fused._ChunkedLogProbFunction is function and not fused._use_triton(torch.device("cpu"))
    monkeypatch.setattr(fused, "_use_triton", lambda device: True)
    with _lean.labelled_positions(torch.device("cuda")):
        assert fused._ChunkedLogProbFunction is function


def test_methods_see_the_same_gradients_either_way(tmp_path: Any) -> None:
    states = []
    for lean in (True, False):
        trainer = sft(tmp_path, [build("ewc", {"samples": 4})], UNEQUAL, model=lora(), max_steps=1)
        trainer.lean = lean
        trainer.train()
        states.append(trainer.method_state()["ewc"]["tensors"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_the_recipe_names_lean_only_when_it_is_off() -> None:
    assert "lean" not in Recipe().document()
    off = Recipe(lean=False)
    assert off.document()["lean"] is False
    assert Recipe.from_document(off.document()) == off
