"""MoCL: a LoRA per task, all of them composed by how near the prompt is to each task."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from meristem.errors import BadInput
from meristem.experts_format import RouterEntry
from meristem.methods.architecture.task_experts import TaskExperts
from meristem.methods.base import Step


class MoCL(TaskExperts):
    """Learns each task in a LoRA of its own, composed with the frozen ones of earlier tasks by task similarity.

    With f(p) the mean input embedding of the prompt's tokens, v_e (width) the vector of task e, e = 1 ... t,

        w = softmax_e(cos(f(p), v_e) / temperature)        y = W x + sum_e w_e (alpha_e / r_e) B_e A_e x

    for each row, in training (where only B_t, A_t learn) and afterwards, without a task id. The training loss of the
    paper has the term ``matching`` * mean_n (1 - cos(f(p_n), v_t)) that draws v_t to the prompts of its task. f is not
    trained, so that term alone has a closed solution, the direction of the mean of f / |f|; that is v_t here.
    With ``learned=True`` v_t starts there and is trained, by the term and by the task's loss through w.

    What the paper leaves open is as in the authors' code: a softmax over a scale, cosines of the input embeddings.
    Their vectors start at random and are always trained.

    ``temperature``: mean weight of the right expert on held-out prompts of three tasks (those of ``meristem demo``,
    SmolLM2-135M-Instruct, whose mean embeddings have cosines of 0.9 to 0.98) at 1/8, the default of the authors'
    code / 0.05 / 0.02 / 0.01: 0.44 / 0.58 / 0.80 / 0.93.

    Source: Wang et al. 2024 (arXiv 2404.00790). Claims: less forgetting. Stages: cpt, cit. State: one LoRA and one
    vector for each task; the cost of a forward grows by one LoRA with every task.
    """

    name = "mocl"

    def __init__(
        self, temperature: float = 0.01, learned: bool = False, matching: float = 1.0, samples: int = 512
    ) -> None:
        if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
            raise BadInput(f"mocl: temperature={temperature!r} must be a finite number above 0")
        if not isinstance(learned, bool):
            raise BadInput(f"mocl: learned={learned!r} must be true or false")
        if not isinstance(matching, int | float) or not 0 <= matching < float("inf"):
            raise BadInput(f"mocl: matching={matching!r} must be a finite number, 0 or more")
        super().__init__(samples)
        self.temperature, self.learned, self.matching = float(temperature), learned, float(matching)

    def router(self) -> RouterEntry:
        return RouterEntry(mode="softmax", temperature=self.temperature)

    def loss(self, step: Step) -> Tensor | None:
        if not self.learned:
            return None
        assert self.experts is not None and self.experts.features is not None and self.vector is not None
        earlier = {expert.about.task for expert in self.old}
        own = torch.tensor(
            [task not in earlier for task in step.tasks] or [True] * len(self.experts.features)
        )
        if not own.any():
            return None
        near = cosine_similarity(self.experts.features, self.vector.to(self.experts.features), dim=-1)
        return self.matching * (1 - near[own.to(near.device)]).mean()
