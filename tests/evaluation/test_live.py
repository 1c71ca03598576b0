"""Watching a training run for forgetting: what is logged, when it stops, and that it changes nothing."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tests import acme
from tests.tiny import tiny_tokenizer
from tests.training.stream import QUIET, rows, tokens, weights
from tests.training.trainers import make
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from meristem import ForgettingCallback
from meristem.errors import BadInput, TrainingFailed
from meristem.evaluation import live
from meristem.evaluation.items import Item, Message
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.generate import Generate
from meristem.evaluation.tasks.perplexity import Perplexity

DOCS = Path(__file__).parents[2] / "docs/methods.md"
OPTIONS = {"max_length": 64, "max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}
FLIPS = "forgetting/negative_flips"


@pytest.fixture(scope="module")
def company(tmp_path_factory):
    """``model`` answers 7 to all questions of task a; ``a.yaml`` asks 40 of them."""
    folder = tmp_path_factory.mktemp("live")
    acme.model_folder(folder / "new")
    acme.suite_file(folder / "a.yaml", "a")
    model = AutoModelForCausalLM.from_pretrained(folder / "new")
    trainer = sft(folder, model, "a", max_steps=15)
    trainer.train()
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def known(company, **changes):
    return AutoModelForCausalLM.from_pretrained(company / "model", **changes)


def sft(folder, model, task, *callbacks, **options):
    """TRL's own trainer, on prompts and completions."""
    arguments = SFTConfig(**{**QUIET, **OPTIONS, "output_dir": str(folder), **options})
    data = Dataset.from_list(acme.training_rows(task))
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def logged(trainer, key="forgetting/score"):
    """``(step, value)`` of every line that has ``key``."""
    return [(line["step"], line[key]) for line in trainer.state.log_history if key in line]


class Reporter(TrainerCallback):
    """What stands where ``report_to`` puts wandb or TensorBoard: it sees what is logged, and no more."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_plain_sft_run_that_forgets_is_logged_and_stopped(company, tmp_path, caplog):
    watch, reporter = ForgettingCallback(company / "a.yaml", patience=2), Reporter()
    trainer = sft(tmp_path, known(company), "b", reporter, watch, **LOGGED)
    trainer.train()

    last = trainer.state.global_step
    assert last < 40 and watch.streak == 2
    scores, flips = logged(trainer), logged(trainer, FLIPS)
    assert [step for step, _ in scores] == list(range(0, last + 1, 4))  # ten looks planned, and the start
    assert scores[0] == (0, 1.0) and scores[-1] == (last, watch.comparison.new_score)
    assert scores[-1][1] < 0.8 and flips[-1][1] == len(watch.flips) == 40 - round(40 * scores[-1][1])
    assert {name.split("/")[0] for name in watch.flips} == {"a"}
    p_values = dict(logged(trainer, "forgetting/p_value"))
    assert p_values[last] < 0.05 and p_values[last - 4] < 0.05 and p_values[0] == 1.0
    assert p_values[last] == pytest.approx(5 * 0.5 ** len(watch.flips))  # McNemar, and five chances

    [line] = [record.getMessage() for record in caplog.records if record.name == "meristem.forgetting"]
    assert line == watch.reason and "\n" not in line
    assert f"at step {last} of 40, training stops: 1.000 -> {scores[-1][1]:.3f} on 40 items of 'a'" in line

    shown = [(step, logs) for step, logs in reporter.seen if "forgetting/score" in logs]
    assert [(step, logs["forgetting/score"]) for step, logs in shown] == scores
    json.dumps(trainer.state.log_history)


def test_a_look_takes_nothing_from_the_trainers_own_lines(company, tmp_path):
    """TRL gathers averages until something is logged, and a line of losses is due at the steps of the looks too."""
    lines = []
    for callbacks in ([], [ForgettingCallback(company / "a.yaml", patience=None, every=1)]):
        trainer = sft(tmp_path, known(company), "b", *callbacks, max_steps=4, **LOGGED)
        trainer.train()
        lines.append([line for line in trainer.state.log_history if "loss" in line])
    assert lines[0] == lines[1] and len(lines[0]) == 4 and "mean_token_accuracy" in lines[0][0]


def test_a_harmless_run_goes_on_to_its_end(company, tmp_path):
    watch = ForgettingCallback(company / "a.yaml", patience=1)
    trainer = sft(tmp_path, known(company), "a", watch)
    trainer.train()
    assert trainer.state.global_step == 40 and watch.reason is None and watch.streak == 0
    assert len(logged(trainer)) == 11 and watch.flips == ()


def test_a_margin_is_what_may_be_lost(company, tmp_path):
    stops = []
    for margin in (0.0, 0.5):
        watch = ForgettingCallback(company / "a.yaml", patience=1, margin=margin, every=1)
        trainer = sft(tmp_path, known(company), "b", watch)
        trainer.train()
        assert watch.reason and watch.comparison.difference < -margin
        stops.append(trainer.state.global_step)
    assert stops[0] < stops[1]


def sampled(company):
    """The probe with a task that draws random numbers: texts sampled at a temperature."""
    asked = tuple(
        Item(f"i{at}", (Message("user", f"{word} ?"),), "7") for at, word in enumerate(acme.WORDS[:6])
    )
    drawn = Generate(max_new_tokens=3, temperature=1.0, samples=2)
    tasks = load_suite(company / "a.yaml").tasks
    return Suite("both", (*tasks, Task("texts", "generate", drawn, "general", asked)))


@pytest.mark.parametrize("kind", ["full", "lora", "bf16"])
def test_training_goes_on_to_the_same_bits(company, tmp_path, kind):
    options = {"max_steps": 6, "bf16": kind == "bf16", "gradient_checkpointing": kind == "lora", **LOGGED}
    found = []
    for watched in (False, True):
        model = known(company, attention_dropout=0.2)
        if kind == "lora":
            torch.manual_seed(0)
            lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
        watch = ForgettingCallback(sampled(company), patience=None, every=2)
        trainer = sft(tmp_path, model, "b", *[watch] * watched, **options)
        trainer.train()
        random_states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        losses = [line for line in trainer.state.log_history if "loss" in line]
        found.append((weights(trainer.model), losses, random_states))
    (plain, losses, states), (other, other_losses, other_states) = found
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    assert losses == other_losses and states == other_states
    assert [step for step, _ in logged(trainer, "forgetting/score/texts")] == [0, 2, 4, 6]


def test_a_resumed_run_is_held_against_the_original_baseline(company, tmp_path):
    """Interrupted between two significant looks: the second one, after it, still stops the run."""
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = sft(tmp_path, known(company), "b", first := ForgettingCallback(company / "a.yaml"), **options)
    whole.train()
    last = whole.state.global_step
    assert first.reason
    for restoring in (False, True):  # callbacks that transformers saves come back as others
        options["restore_callback_states_from_checkpoint"] = restoring
        second = ForgettingCallback(company / "a.yaml")
        resumed = sft(tmp_path, known(company), "b", second, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last - 1}"))
        assert resumed.state.global_step == last and second.reason == first.reason
        assert second.flips == first.flips and logged(resumed) == logged(whole)
        assert [row["score"] for row in second.baseline] == [row["score"] for row in first.baseline]

    with pytest.raises(BadInput, match="was watched with another probe than 'both'"):
        other = sft(tmp_path, known(company), "b", ForgettingCallback(sampled(company)), **options)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_that_was_not_watched_from_its_start_is_refused(company, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    sft(tmp_path, known(company), "b", **options).train()
    watch = ForgettingCallback(company / "a.yaml", patience=1)
    with pytest.raises(BadInput, match="the run up to step 1 was not watched"):
        late = sft(tmp_path, known(company), "b", watch, **options)
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_second_training_has_a_baseline_of_its_own(company, tmp_path):
    watch = ForgettingCallback(company / "a.yaml", patience=None, every=40)
    trainer = sft(tmp_path, known(company), "b", watch)
    trainer.train()
    assert watch.comparison.old_score == 1.0 > watch.comparison.new_score
    end = watch.comparison.new_score
    trainer.train()
    assert watch.comparison.old_score == end


def test_a_run_that_something_else_stops_is_looked_at_once_more(company, tmp_path):
    watch = ForgettingCallback(company / "a.yaml", patience=1, every=4)
    trainer = sft(tmp_path, known(company), "b", watch, StopAt(6))
    trainer.train()
    assert [step for step, _ in logged(trainer)] == [0, 4, 6]


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_it_watches_trainers_with_methods(company, tmp_path, kind):
    watch = ForgettingCallback(company / "a.yaml", patience=None, every=1)
    replay = ["experience-replay"] if kind == "sft" else []
    trainer = make(kind, tmp_path, [methods(name) for name in replay], model=known(company), max_steps=2,
                   per_device_train_batch_size=2, callbacks=[watch], **LOGGED)  # fmt: skip
    trainer.train()
    assert [step for step, _ in logged(trainer)] == [0, 1, 2] and logged(trainer)[0][1] == 1.0
    assert len([line for line in trainer.state.log_history if "loss" in line]) == 2


def methods(name):
    from meristem.methods import build

    return build(name)


def plain_trainer(folder, model, callbacks, **options):
    arguments = TrainingArguments(**{**QUIET, "output_dir": str(folder), "max_steps": 4, **options})
    collate = transformers.DataCollatorForSeq2Seq(tiny_tokenizer())
    data = Dataset.from_list(
        [{k: v for k, v in row.items() if k != "id" and k != "task"} for row in tokens(rows(8))]
    )
    return lambda **more: Trainer(
        model, args=arguments, train_dataset=data, data_collator=collate, callbacks=callbacks, **more
    )


def test_a_plain_trainer_is_watched_where_it_has_a_tokenizer(company, tmp_path):
    watch = ForgettingCallback(str(company / "a.yaml"), patience=None, every=2)
    made = plain_trainer(tmp_path, known(company), [watch])
    trainer = made(processing_class=tiny_tokenizer())
    trainer.train()
    assert [step for step, _ in logged(trainer)] == [0, 2, 4]
    with pytest.raises(
        BadInput, match="Trainer has no tokenizer to read the probe with; give it processing_class="
    ):
        made().train()


def test_scores_with_a_unit_are_watched_too(company, tmp_path):
    """Bits per byte of texts: nothing flips, and the score is minus the bits."""
    texts = tuple(Item(word, (), "", text=f"A {word} ? 7") for word in acme.WORDS)
    probe = Suite("bits", (Task("texts", "perplexity", Perplexity(), "general", texts),))
    watch = ForgettingCallback(probe, patience=1, every=4)
    trainer = sft(tmp_path, known(company), "b", watch)
    trainer.train()
    scores = logged(trainer)
    assert watch.reason and scores[-1][1] < scores[0][1] < 0 and trainer.state.global_step < 40
    assert not logged(trainer, FLIPS) and watch.flips == ()
    assert f"{-scores[-1][1]:.4f} bits per byte on 20 items of 'bits'; the loss was" in watch.reason


def test_two_watches_have_names(company, tmp_path):
    second = ForgettingCallback(company / "a.yaml", patience=None, every=2, name="again")
    both = [ForgettingCallback(company / "a.yaml", patience=None, every=2), second]
    trainer = sft(tmp_path, known(company), "b", *both, max_steps=2)
    trainer.train()
    assert logged(trainer) == logged(trainer, "again/score")
    second.name = "forgetting"
    with pytest.raises(BadInput, match="two watches are named 'forgetting'"):
        trainer.train()


def test_weights_that_cannot_be_measured_end_the_run(company, tmp_path):
    class Tear(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))

    watch = ForgettingCallback(company / "a.yaml", patience=1, every=1)
    with pytest.raises(
        TrainingFailed, match="forgetting: the model cannot be measured at step 1: suite 'a', task 'a'"
    ):
        sft(tmp_path, known(company), "b", Tear(), watch).train()


def test_a_probe_that_could_show_nothing_is_refused_before_the_first_step(company, tmp_path):
    steps = Counter()

    class Count(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps["begun"] += 1

    untaught = AutoModelForCausalLM.from_pretrained(company / "new")
    acme.suite_file(tmp_path / "c.yaml", "c", options="['1', '9']")
    suite = load_suite(tmp_path / "c.yaml")
    few = Suite("few", (Task("c", "choice", suite.tasks[0].settings, "target", suite.tasks[0].items[:3]),))
    with pytest.raises(
        BadInput, match=r"items of 'few' right before training, and losing fewer than 7 is never sig"
    ):
        sft(tmp_path, untaught, "b", Count(), ForgettingCallback(few)).train()
    with pytest.raises(BadInput, match="patience 30 with 10 looks in 40 steps could never stop the run"):
        sft(tmp_path, untaught, "b", Count(), ForgettingCallback(few, patience=30)).train()
    with pytest.raises(BadInput, match="RewardTrainer trains a model that writes no text"):
        make("reward", tmp_path, [], max_steps=1, callbacks=[Count(), ForgettingCallback(few)]).train()
    assert not steps


def test_a_bar_is_shown_where_a_look_takes_long(company, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(live, "BAR_AFTER", 0.0)
    for quiet in (True, False):
        watch = ForgettingCallback(company / "a.yaml", patience=None, every=1)
        sft(tmp_path, known(company), "b", watch, max_steps=1, disable_tqdm=quiet).train()
        assert ("forgetting:" in capfd.readouterr().err) is not quiet


def test_the_script_of_the_documentation_runs(company, tmp_path, monkeypatch, capsys):
    section = DOCS.read_text(encoding="utf-8").partition("## Watching for forgetting")[2]
    script = re.search(r"```python\n(.*?)```", section, re.S)[1]
    monkeypatch.chdir(tmp_path)
    acme.suite_file(tmp_path / "core.yaml", "a")
    args = SFTConfig(**{**QUIET, "output_dir": str(tmp_path)})
    names = {"model": known(company), "args": args, "rows": Dataset.from_list(acme.training_rows("a"))}
    exec(script, names)
    assert capsys.readouterr().out.endswith("None ()\n")
    assert logged(names["trainer"])[0] == (0, 1.0) and len(logged(names["trainer"])) == 7
    for key in ("patience", "every", "margin", "alpha", "name"):
        default = inspect.signature(ForgettingCallback).parameters[key].default
        assert f"| `{key}` | {default if key != 'name' else f'`{default}`'} |" in section
