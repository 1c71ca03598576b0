"""Task type ``perplexity``: how well the model predicts plain text.

For a text of B UTF-8 bytes and tokens t_1 ... t_n::

    bits per byte = -sum_j log2 p(t_j | t_0, t_<j) / B

Bytes, not tokens, so that models with different tokenizers compare. t_0 is the beginning-of-sequence token, or the
end-of-sequence token where the tokenizer has none; it is a condition and never predicted. Tokens are the text's own,
without special ones and without a chat template. A text longer than the window goes through windows that predict
every token exactly once (``engine.windows``), as ``loglikelihood_rolling`` of lm-evaluation-harness does; nothing is
cut. That harness also predicts the special tokens that some tokenizers put in front of a text; here they are left out.

A version of experts is routed by the whole text in every window: its first tokens say nothing yet, and training on
texts routes them so as well. Under ``top-1`` that choice is worth at most log2(experts) bits a text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, text_of
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks.base import Run, TaskType, Unit, for_each, result

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task

Window = tuple[list[int], list[int]]


class Perplexity(TaskType):
    """``window``: most tokens that the model sees at once; by default as many as it was built for.

    A smaller window makes models with different ones comparable. The score is minus the bits per byte.
    """

    KEYS: ClassVar[frozenset[str]] = frozenset({"text"})
    PROMPTED: ClassVar[bool] = False
    metric: Literal["bits_per_byte"] = "bits_per_byte"
    window: int | None = Field(default=None, ge=2)

    @property
    def unit(self) -> Unit:
        return "bits_per_byte"

    def parts(self, raw: dict[str, Any]) -> dict[str, Any]:
        return {"text": text_of(raw.get("text"), '"text"')}

    def check(self, item: Item) -> None:
        if not item.text:
            raise Refused('a perplexity item needs "text"')

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        from meristem.engine.score import score_options

        windows = for_each(task.items, lambda item: self._windows(engine, item))
        flat = [(item, *window) for item, own in zip(task.items, windows, strict=True) for window in own]
        progress = run.progress
        scored = score_options(
            engine,
            [context for _, context, _ in flat],
            [[predicted] for _, _, predicted in flat],
            routes=[[token for _, predicted in own for token in predicted] for own in windows for _ in own],
            names=[f"item {item.id!r}" for item, _, _ in flat],
            journal=run.journal("windows"),
            progress=progress and (lambda done, total: progress(len(windows) * done // total, len(windows))),
        )
        nats = (score.logprob for [score] in scored)
        return [
            _row(task, item, -sum(next(nats) for _ in own), sum(len(predicted) for _, predicted in own))
            for item, own in zip(task.items, windows, strict=True)
        ]

    def _windows(self, engine: Engine, item: Item) -> list[Window]:
        from meristem.engine.windows import rolling_windows

        tokens = engine.tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"]
        if not tokens:
            raise BadInput("the text has no tokens; remove it")
        longest = min(engine.max_length or len(tokens), self.window or len(tokens), len(tokens))
        return rolling_windows(tokens, first_condition(engine), longest)


def first_condition(engine: Engine) -> int:
    """The token that a text's first token is predicted from: beginning of sequence, else end of sequence."""
    for token in (engine.tokenizer.bos_token_id, engine.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BadInput("the tokenizer has no beginning or end of sequence token; a text needs a first condition")


def _row(task: Task, item: Item, nats: float, tokens: int) -> ItemResult:
    assert item.text is not None
    bits, size = nats / math.log(2), len(item.text.encode())
    detail = {"bits": round(bits, 6), "bytes": size, "tokens": tokens}
    return result(task, item, "", -round(bits / size, 9), detail)
