"""Dialogues in the transcript form of public preference data (``Human: ... Assistant:``) as chat messages."""

from __future__ import annotations

import re

Message = dict[str, str]
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def messages_of(prompt: str) -> list[Message]:
    """The turns of a transcript, without the empty one at its end; any other text is one user message."""
    if not _TURN.match(prompt):
        return [{"role": "user", "content": prompt}]
    parts = _TURN.split(prompt)[1:]
    turns = [
        {"role": _ROLES[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return [turn for turn in turns if turn["content"]]


def last_words(messages: list[Message], words: int) -> list[Message]:
    """The end of a dialogue, at most ``words`` words of it, beginning with a user's turn."""
    kept: list[Message] = []
    for message in reversed(messages):
        found = message["content"].split()
        if kept and len(found) > words:
            break
        found = found[-words:]
        kept.insert(0, {"role": message["role"], "content": " ".join(found)})
        words -= len(found)
    while len(kept) > 1 and kept[0]["role"] != "user":
        kept.pop(0)
    return kept
