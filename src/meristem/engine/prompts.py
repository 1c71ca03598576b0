"""From messages to token ids, exactly as the model is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from meristem.engine.load import Engine
from meristem.errors import BadInput

Messages = Sequence[Mapping[str, str]]
Format = Literal["chat", "text"]
Side = Literal["refuse", "left", "right"]


def render(engine: Engine, messages: str | Messages, format: Format = "chat") -> str:
    """The prompt as text.

    ``chat``: the tokenizer's chat template with the opening of an assistant's turn; a string is one user message.
    Without a template, and as ``text``: the contents joined by blank lines.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not _templated(engine, format):
        return "\n\n".join(message["content"] for message in messages)
    try:
        text = engine.tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise BadInput(f"the chat template refuses these messages: {error}") from error
    return str(text)


def encode_prompt(engine: Engine, messages: str | Messages, format: Format = "chat") -> list[int]:
    """Token ids of a prompt (``render``). Special tokens: as the template writes them, or the tokenizer's usual ones."""
    return _encode_all(engine, [render(engine, messages, format)], format)[0]


def encode_options(
    engine: Engine, messages: str | Messages, options: Sequence[str], format: Format = "chat"
) -> tuple[list[int], list[list[int]]]:
    """``(context, continuations)``: the prompt's token ids, and those of each option after it.

    Prompt and option are tokenized together and split where the prompt's own tokens end, as lm-evaluation-harness
    does (``_encode_pair``). In a chat the answer starts at once; in text it follows after one space, and white space
    that ends the prompt belongs to the option, as words carry their space in front.
    """
    prompt = render(engine, messages, format)
    joint = ""
    if not _templated(engine, format):
        stripped = prompt.rstrip()
        prompt, joint = stripped, f"{prompt[len(stripped) :]} "
    context, *whole = _encode_all(engine, [prompt, *(prompt + joint + option for option in options)], format)
    continuations = [ids[len(context) :] for ids in whole]
    for option, ids in zip(options, continuations, strict=True):
        if not option or not ids:
            raise BadInput(f"the option {option!r} has no tokens after the prompt")
    return context, continuations


def fit(tokens: Sequence[int], room: int | None, side: Side = "refuse") -> tuple[list[int], int]:
    """``tokens`` cut to ``room`` (``None``: no bound) on ``side``, and how many were cut.

    ``left`` drops the beginning, ``right`` the end; ``refuse`` raises ``BadInput``.
    """
    over = 0 if room is None else max(0, len(tokens) - room)
    if not over:
        return list(tokens), 0
    if not room or room < 1:
        raise BadInput("what must follow the prompt fills the model's window alone; shorten it")
    if side == "refuse":
        raise BadInput(
            f"{len(tokens)} tokens, but there is room for {room}; shorten it or set a truncation side"
        )
    return list(tokens[over:] if side == "left" else tokens[:room]), over


def _templated(engine: Engine, format: Format) -> bool:
    return format == "chat" and engine.tokenizer.chat_template is not None


def _encode_all(engine: Engine, texts: list[str], format: Format) -> list[list[int]]:
    # verbose: what is too long for the model is our callers' to refuse or to cut
    found: list[list[int]] = engine.tokenizer(
        texts, add_special_tokens=not _templated(engine, format), verbose=False
    )["input_ids"]
    if not found[0]:
        raise BadInput("the prompt has no tokens; give it some text")
    return found
