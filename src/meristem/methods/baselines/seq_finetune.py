"""Sequential fine-tuning, the lower bound."""

from __future__ import annotations

from meristem.methods.base import Method


class SeqFinetune(Method):
    """Plain fine-tuning on each task's rows, going on from the weights that the last task left.

    theta_t = argmin_theta L(rows of task t), started at theta_{t-1}

    with no hook and no term: the run without any method, under a name that a recipe can hold. What it forgets is
    what a method has to keep.

    Claims: none. Stages: all. State: none.
    """

    name = "seq-finetune"
    alone = True
