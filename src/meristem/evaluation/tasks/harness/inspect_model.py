"""Our engine as a model of Inspect. Imports inspect_ai and torch.

Inspect solves samples concurrently. Requests are collected in rounds, each when every sample that is still being
solved waits for the model, and generated together in the order of the samples: so batches follow from the task alone
and a rerun forms the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import anyio
from inspect_ai._util.registry import RegistryInfo, set_registry_info
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)

from meristem.engine.generate import Generated, generate
from meristem.engine.load import Engine
from meristem.engine.prompts import encode_prompt, fit
from meristem.errors import BadInput, MeristemError
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run
from meristem.evaluation.tasks.harness.shared import digest

Place = tuple[int, int]  # of a sample among the items, and the epoch
Way = dict[str, Any]  # arguments of ``generate``
UNDERSTOOD = frozenset({"max_tokens", "temperature", "top_p", "seed", "stop_seqs", "num_choices"})
# how Inspect talks to a provider; nothing of it shapes a text
TRANSPORT = frozenset({"max_connections", "max_retries", "timeout", "attempt_timeout", "system_message"})


@dataclass
class _Request:
    prompt: list[int]
    way: Way
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: list[Generated] | MeristemError | None = None


class Rounds:
    """``solved`` samples of ``expected`` so far; ``failure``: the first error of ours, which Inspect only logs."""

    def __init__(self, engine: Engine, task: Task, run: Run, expected: int, max_new_tokens: int) -> None:
        self.engine, self.task, self.journal = engine, task, run.journal
        self.expected, self.max_new_tokens = expected, max_new_tokens
        self.report = run.progress
        self.cuts: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        self.failure: MeristemError | None = None
        self.started = self.solved = 0
        self._waiting: dict[Place, list[_Request]] = {}
        self._here: ContextVar[Place | None] = ContextVar("sample", default=None)

    @contextmanager
    def solving(self, place: Place) -> Iterator[None]:
        """Around all that one sample's solvers do."""
        token = self._here.set(place)
        self.started += 1
        self._waiting[place] = []
        try:
            yield
        finally:
            self._here.reset(token)
            del self._waiting[place]
            self.solved += 1
            self._tell(self.solved)
            self._go_on()

    async def ask(
        self, messages: list[dict[str, str]], config: GenerateConfig
    ) -> tuple[list[Generated], int]:
        """The texts, and the tokens of the prompt."""
        place = self._here.get()
        if place is None:
            raise self._failed(BadInput("its scorer asks a model; use a generate task with a judge"))
        try:
            request = self._request(place, messages, config)
        except BadInput as error:
            raise self._failed(BadInput(f"item {self.task.items[place[0]].id!r}: {error}")) from error
        self._waiting[place].append(request)
        self._go_on()
        await request.done.wait()
        if isinstance(request.answer, MeristemError):
            raise request.answer
        assert request.answer is not None
        used = len(request.prompt) + sum(sample.tokens for sample in request.answer)
        self.tokens[place[0]] = self.tokens.get(place[0], 0) + used
        return request.answer, len(request.prompt)

    def _request(self, place: Place, messages: list[dict[str, str]], config: GenerateConfig) -> _Request:
        way = _way(config, self.max_new_tokens)
        room = self.engine.max_length and self.engine.max_length - way["max_new_tokens"]
        prompt, cut = fit(encode_prompt(self.engine, messages, self.task.format), room, self.task.truncation)
        if cut:
            self.cuts[place[0]] = max(cut, self.cuts.get(place[0], 0))
        return _Request(prompt, way)

    def _go_on(self) -> None:
        """Generate once every sample has begun and each that is being solved waits."""
        if self.started < self.expected or not self._waiting or not all(self._waiting.values()):
            return
        ready = [request for place in sorted(self._waiting) for request in self._waiting[place]]
        for requests in self._waiting.values():
            requests.clear()
        groups: dict[str, list[_Request]] = {}
        for request in ready:
            groups.setdefault(digest(request.way), []).append(request)
        answered = 0
        for group in groups.values():
            self._generate(group, self.solved + answered)
            answered += len(group)

    def _tell(self, done: int) -> None:
        """Samples done, counting those whose request of this round is answered."""
        if self.report:
            items = len(self.task.items)
            self.report(items * min(done, self.expected) // self.expected, items)

    def _generate(self, group: list[_Request], before: int) -> None:
        prompts, way = [request.prompt for request in group], group[0].way
        # named by what was asked: a resumed run must never take another question's answer
        part = f"samples-{digest([prompts, way]).removeprefix('sha256:')[:16]}"
        answers: list[Any]
        try:
            answers = generate(
                self.engine,
                prompts,
                **way,
                journal=self.journal(part),
                progress=lambda done, _: self._tell(before + done),
            )
        except MeristemError as error:
            answers = [self._failed(error)] * len(group)
        for request, answer in zip(group, answers, strict=True):
            request.answer = answer
            request.done.set()

    def _failed(self, error: MeristemError) -> MeristemError:
        self.failure = self.failure or error
        return error


class EngineAPI(ModelAPI):
    """What Inspect calls for every request of a sample."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__("engine")
        self.rounds = rounds
        # as ``@modelapi`` names what ``get_model`` makes; that would write its arguments, the engine, into the log
        set_registry_info(self, RegistryInfo(type="modelapi", name="meristem"))

    def max_connections(self) -> int:
        return self.rounds.expected

    async def generate(
        self, input: list[Any], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise self.rounds._failed(
                BadInput("it uses tools; tasks that run tools or code are not supported")
            )
        texts, asked = await self.rounds.ask([{"role": m.role, "content": m.text} for m in input], config)
        made = sum(text.tokens for text in texts)
        return ModelOutput(
            model=self.model_name,
            choices=[_choice(text) for text in texts],
            usage=ModelUsage(input_tokens=asked, output_tokens=made, total_tokens=asked + made),
        )


def _choice(made: Generated) -> ChatCompletionChoice:
    return ChatCompletionChoice(
        message=ChatMessageAssistant(content=made.text, source="generate"),
        stop_reason="stop" if made.finished else "max_tokens",
    )


def _way(config: GenerateConfig, max_new_tokens: int) -> Way:
    """Greedy unless the task asks for a temperature. ``BadInput`` for what our engine cannot do."""
    given = config.model_dump(exclude_none=True)
    if strange := sorted(given.keys() - UNDERSTOOD - TRANSPORT):
        raise BadInput(f"generation settings {', '.join(strange)} are not supported; set none of them")
    return {
        "max_new_tokens": config.max_tokens or max_new_tokens,
        "samples": config.num_choices or 1,
        "temperature": config.temperature or 0.0,
        "top_p": config.top_p or 1.0,
        "seed": config.seed or 0,
        "stop": list(config.stop_seqs or ()),
    }
