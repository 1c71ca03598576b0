"""Our engine as a model of lm-evaluation-harness. Imports lm_eval and torch.

Strings become tokens as in lm-eval's own ``hf`` model (``_encode_pair`` is inherited; special tokens unless the text
begins with the prefix token), so that the same task asks the same question. Contexts that requests share are encoded
once. A context that does not fit the window is cut on the task's declared side and counted, or refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from meristem.engine.generate import generate
from meristem.engine.load import Engine
from meristem.engine.prompts import fit
from meristem.engine.score import score_options
from meristem.engine.windows import rolling_windows
from meristem.errors import BadInput
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run
from meristem.evaluation.tasks.harness.shared import digest

MAX_NEW_TOKENS = 256  # lm-eval's own default
UNDERSTOOD = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})
Tokens = list[int]


class EngineLM(TemplateLM):
    """``cuts``, ``tokens``: per document how many had no room, and how many were encoded or generated.
    ``templated``: prompts go through the chat template."""

    def __init__(self, engine: Engine, task: Task, run: Run) -> None:
        super().__init__()
        self.engine, self.task, self.run = engine, task, run
        self.tokenizer = engine.tokenizer
        self.templated = task.format == "chat" and engine.tokenizer.chat_template is not None
        self.cuts: dict[int, int] = {}
        self.tokens: Counter[int] = Counter()
        self._documents: list[int] = []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise BadInput("the tokenizer has neither a beginning nor an end of text to start from")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        return ""  # names a cache of lm-eval that is not used; a path must not get there

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise BadInput(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._documents = [request.doc_id for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Tokens, Tokens]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.engine.max_length
        contexts = []
        for document, (_, context, option) in zip(self._documents, requests, strict=True):
            # the last token is predicted, never fed
            room = None if longest is None else longest + 1 - len(option)
            contexts.append(self._fitted(document, context, room))
        return self._scored("loglikelihood", contexts, [option for _, _, option in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self._documents, contexts, options, owners = [], [], [], []
        routes: list[Tokens] = []
        for at, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for context, predicted in rolling_windows(
                tokens, self.prefix_token_id, self.engine.max_length or max(1, len(tokens))
            ):
                self._documents.append(request.doc_id)
                contexts.append(context)
                options.append(predicted)
                routes.append(tokens)
                owners.append(at)
        totals = [0.0] * len(requests)
        for at, (logprob, _) in zip(owners, self._scored("rolling", contexts, options, routes), strict=True):
            totals[at] += logprob
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Requests with the same settings go together, in the order in which the settings first appear."""
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(digest(request.args[1]), []).append(at)
        texts = [""] * len(requests)
        for number, members in enumerate(groups.values()):
            asked = [requests[at] for at in members]
            for at, text in zip(members, self._generated(f"generate-{number}", asked), strict=True):
                texts[at] = text
        return texts

    def _generated(self, part: str, requests: list[Any]) -> list[str]:
        way = normalize_gen_kwargs(requests[0].args[1], MAX_NEW_TOKENS)
        if strange := sorted(way.keys() - UNDERSTOOD):
            raise BadInput(
                f"generation_kwargs: {', '.join(strange)} is not supported; use {', '.join(sorted(UNDERSTOOD))}"
            )
        length = int(way["max_gen_toks"])
        room = None if self.engine.max_length is None else self.engine.max_length - length
        made = generate(
            self.engine,
            [self._fitted(r.doc_id, self.tok_encode(r.args[0]), room) for r in requests],
            max_new_tokens=length,
            temperature=float(way.get("temperature") or 0.0) if way.get("do_sample") else 0.0,
            top_p=float(way.get("top_p") or 1.0),
            stop=[text for text in way.get("until") or () if text],
            names=[f"item {r.doc_id}" for r in requests],
            journal=self.run.journal(part),
            progress=self._progress(),
        )
        for request, [sample] in zip(requests, made, strict=True):
            self.tokens[request.doc_id] += sample.tokens
        return [sample.text for [sample] in made]

    def _scored(
        self,
        part: str,
        contexts: Sequence[Tokens],
        options: Sequence[Tokens],
        routes: Sequence[Tokens] | None = None,
    ) -> list[tuple[float, bool]]:
        found = score_options(
            self.engine,
            contexts,
            [[option] for option in options],
            routes=routes,
            names=[f"item {document}" for document in self._documents],
            journal=self.run.journal(part),
            progress=self._progress(),
        )
        for document, context in {
            (document, tuple(context)) for document, context in zip(self._documents, contexts, strict=True)
        }:
            self.tokens[document] += len(context)
        for document, option in zip(self._documents, options, strict=True):
            self.tokens[document] += len(option) - 1  # the last one is predicted, never fed
        return [(score.logprob, score.greedy) for [score] in found]

    def _fitted(self, document: int, tokens: Tokens, room: int | None) -> Tokens:
        try:
            kept, cut = fit(tokens, room, self.task.truncation)
        except BadInput as error:
            raise BadInput(f"item {document}: {error}") from error
        if cut:
            self.cuts[document] = max(cut, self.cuts.get(document, 0))
        return kept

    def _progress(self) -> Callable[[int, int], None] | None:
        """Requests done as items done."""
        report, items = self.run.progress, len(self.task.items)
        return (lambda done, total: report(items * done // total, items)) if report else None
