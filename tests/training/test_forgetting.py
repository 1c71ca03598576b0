"""Claims: on the tiny three-task stream each method forgets less than sequential fine-tuning."""

from functools import cache
from statistics import mean

import pytest
import torch
from tests.tiny import new_model, three_tasks
from tests.training.stream import plain, tokens

from meristem.methods import EWC, ExperienceReplay, Joint

SEEDS = (0, 1, 2)
STEPS = 40

METHODS = {
    "sequential": list,
    "replay": lambda: [ExperienceReplay(ratio=0.5)],
    "ewc": lambda: [EWC(strength=200)],
    "joint": lambda: [Joint()],
    "both": lambda: [ExperienceReplay(ratio=0.5), EWC(strength=50)],
}


@cache
def stream(kind, seed, folder):
    """(forgetting, final loss) in nats per token.

    Forgetting is the mean over tasks A, B of (loss at the end - loss right after learning the task); the final
    loss is the mean over all three tasks, so that a method cannot win by not learning.
    """
    model, state, learned = new_model(seed), None, {}
    tasks = {task: tokens(rows) for task, rows in three_tasks().items()}
    for task, rows in tasks.items():
        options = {"task": task, "method_state": state, "model": model, "seed": seed}
        options["history"] = {earlier: tasks[earlier] for earlier in learned}
        trainer = plain(
            folder, METHODS[kind](), rows, max_steps=STEPS, per_device_train_batch_size=6, **options
        )
        trainer.train()
        assert trainer.state.global_step == STEPS
        model, state = trainer.model, trainer.method_state()
        learned[task] = loss(trainer, rows)
    final = {task: loss(trainer, rows) for task, rows in tasks.items()}
    return mean(final[task] - learned[task] for task in "AB"), mean(final.values())


def loss(trainer, rows):
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.context.loss(next(trainer.context.batches(rows, batch_size=len(rows)))))


@pytest.mark.parametrize("kind", ["replay", "ewc", "joint", "both"])
def test_forgets_less_than_sequential_fine_tuning(kind, tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp() / "stream")
    forgot, final = map(mean, zip(*(stream(kind, seed, folder) for seed in SEEDS), strict=True))
    plain_forgot, plain_final = map(
        mean, zip(*(stream("sequential", seed, folder) for seed in SEEDS), strict=True)
    )
    print(kind, forgot, plain_forgot, final, plain_final)  # shown when the next line fails
    assert forgot < plain_forgot - 0.3 and final < plain_final
