"""Parameter isolation: a LoRA per task, and the prompt decides which one answers."""

from __future__ import annotations

from meristem.errors import BadInput
from meristem.experts_format import RouterEntry
from meristem.methods.architecture.task_experts import TaskExperts


class ParamIsolation(TaskExperts):
    """Learns each task in a LoRA of its own that no later task touches; the prompt alone picks the one that answers.

    With f(p) the mean input embedding of the prompt's tokens and v_e (width) the vector of task e,

        v_e = direction of mean_n f(p_n) / |f(p_n)|        over ``samples`` rows of the task
        e*  = argmax_e cos(f(p), v_e)                      y = W x + (alpha / r) B_e* A_e* x

    In training every row, replayed ones included, goes to the new expert. Everywhere else the router picks, without a
    task id; a prompt whose best cosine is below ``unknown`` is answered by the base alone. A task's errors are those
    of its own LoRA and those of the router: nothing is forgotten, and nothing is shared. Tasks whose prompts look
    alike are mistaken for each other.

    Source: the isolation of a subnetwork per task, Rusu et al. 2016 (arXiv 1606.04671), with LoRA (arXiv
    2106.09685) as the subnetwork and a nearest-mean router as in iCaRL (Rebuffi et al. 2017, arXiv 1611.07725).
    Claims: less forgetting. Stages: cpt, cit. State: one LoRA and one vector for each task.
    """

    name = "param-isolation"
    newest_alone = True

    def __init__(self, unknown: float | None = None, samples: int = 512) -> None:
        if unknown is not None and (not isinstance(unknown, int | float) or not -1 <= unknown <= 1):
            raise BadInput(f"param-isolation: unknown={unknown!r} must be a cosine, -1 to 1, or none")
        super().__init__(samples)
        self.unknown = unknown

    def router(self) -> RouterEntry:
        return RouterEntry(mode="top-1", unknown=self.unknown)
