"""From messages to token ids, exactly as the model is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meristem.engine.load import Engine
from meristem.errors import BadInput

Messages = Sequence[Mapping[str, str]]


def encode_prompt(engine: Engine, messages: str | Messages) -> list[int]:
    """Token ids of a prompt.

    With a chat template: the template with ``add_generation_prompt=True``; a string is one user message.
    Without: the contents joined by blank lines, with the tokenizer's usual special tokens.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    tokenizer = engine.tokenizer
    if tokenizer.chat_template is None:
        ids = tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
    else:
        try:
            ids = tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # a template is a program: it may raise anything
            raise BadInput(f"the chat template refuses these messages: {error}") from error
    if not ids:
        raise BadInput("the prompt has no tokens; give it some text")
    return [int(token) for token in ids]


def encode_option(engine: Engine, option: str) -> list[int]:
    """Token ids of an answer that follows a prompt.

    After a chat template's generation prompt the answer starts at once; after plain text it starts with
    a space, as words do.
    """
    text = option if engine.tokenizer.chat_template is not None else f" {option}"
    ids = [int(token) for token in engine.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise BadInput(f"the option {option!r} has no tokens")
    return ids
