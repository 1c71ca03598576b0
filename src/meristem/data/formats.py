"""Training data in TRL's standard shapes: read, validate, normalise.

==================  ====================================================  =================
shape               row                                                   stages
==================  ====================================================  =================
messages            ``{"messages": [{"role", "content"}, ...]}``           cit
prompt-completion   ``{"prompt", "completion"}``, strings or messages      cit
text                ``{"text"}``                                          cpt
preference          ``{"prompt", "chosen", "rejected"}``                   ca
==================  ====================================================  =================

Every row may also carry ``id``, ``task``, ``slice`` and ``label``. One file holds one shape, because a
trainer looks at the first row and believes it for all.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meristem.data.jsonl import Refused, read_objects, stem_of
from meristem.errors import BadInput

SHAPES = {
    "messages": frozenset({"messages"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"prompt", "chosen", "rejected"}),
}
OPTIONAL = frozenset({"id", "task", "slice", "label"})
ROLES = ("system", "user", "assistant", "tool")
SHAPES_TEXT = (
    'a row is {"messages"}, {"prompt", "completion"}, {"text"} or {"prompt", "chosen", "rejected"}, '
    'and may add "id", "task", "slice", "label"'
)

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Read, validate and normalise a data file; nothing else happens before all of it is valid.

    Every row gets a string ``id``: its own, or ``<file stem>-<line number>``. Raises ``BadInput`` with
    file, line and remedy.
    """
    path = Path(path)
    stem = stem_of(path)
    rows: list[Row] = []
    lines: dict[str, int] = {}
    first: tuple[str, int] | None = None
    for number, raw in read_objects(path):
        try:
            row = _normalise(raw, f"{stem}-{number}")
        except Refused as error:
            raise BadInput.at(path, number, str(error)) from None
        kind = _kind(row)
        first = first or (kind, number)
        if kind != first[0]:
            raise BadInput.at(
                path, number, f"a {kind} row, but line {first[1]} is {first[0]}; one file holds one shape"
            )
        if row["id"] in lines:
            raise BadInput.at(
                path, number, f"id {row['id']!r} is already used on line {lines[row['id']]}; make ids unique"
            )
        lines[row["id"]] = number
        rows.append(row)
    return rows


def shape_of(rows: Sequence[Row]) -> str:
    """The shape of normalised rows: a key of ``SHAPES``."""
    if not rows:
        raise BadInput("no rows: a data set needs at least one")
    return _shape(rows[0])


def prompt_messages(row: Row) -> list[dict[str, str]]:
    """What the model is shown before it answers, as chat messages.

    A string prompt becomes one user message. ``messages`` rows lose their last (assistant) turn; a
    ``text`` row has no prompt and gives ``[]``.
    """
    if "messages" in row:
        return [dict(message) for message in row["messages"][:-1]]
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt or []]


def normalized_text(row: Row) -> str:
    """The row's input text for leak checks: NFKC, lower case, white space folded to single spaces.

    System messages are left out: the same question under another instruction is still the same question.
    """
    if "text" in row:
        return fold(row["text"])
    return fold(" ".join(m["content"] for m in prompt_messages(row) if m["role"] != "system"))


def fold(text: str) -> str:
    """``text`` in NFKC, lower case, with runs of white space folded to one space."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _shape(row: Row) -> str:
    return next(name for name, keys in SHAPES.items() if keys == row.keys() - OPTIONAL)


def _kind(row: Row) -> str:
    """Shape, and whether its texts are strings or messages: a file keeps to one of both."""
    value = row.get("prompt")
    return _shape(row) + ("" if value is None else " (strings)" if isinstance(value, str) else " (messages)")


def _normalise(raw: Row, default_id: str) -> Row:
    keys = raw.keys() - OPTIONAL
    shape = next((name for name, wanted in SHAPES.items() if wanted == keys), None)
    if shape is None:
        raise Refused(f"keys {sorted(raw)} fit no shape; {SHAPES_TEXT}")
    row: Row = {"id": identifier(raw.get("id"), default_id)}
    for key in ("task", "slice"):
        if raw.get(key) is not None:
            row[key] = _nonempty(raw[key], f'"{key}"')
    if raw.get("label") is not None:
        row["label"] = _label(raw["label"])
    if shape == "messages":
        row["messages"] = _conversation(raw["messages"])
    elif shape == "text":
        row["text"] = _nonempty(raw["text"], '"text"')
    else:
        row.update(_prompted(raw, sorted(keys - {"prompt"})))
    return row


def identifier(value: Any, default: str) -> str:
    """A given id as a string, or the default."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise Refused('"id" must be a non-empty string or an integer')
    return str(value)


def _label(value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    raise Refused('"label" must be a string, a number or true/false')


def _nonempty(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} must be a string, not {_json_type(value)}")
    if not value.strip():
        raise Refused(f"{name} is empty; fill it or remove the row")
    return value


def _conversation(value: Any) -> list[dict[str, str]]:
    """A whole conversation: ends with a non-empty assistant message that has something before it."""
    messages = _messages(value, '"messages"')
    if messages[-1]["role"] != "assistant":
        raise Refused('"messages" must end with an assistant message: it is what is learned')
    if len(messages) == 1:
        raise Refused('"messages" has no message before the assistant\'s; add the user message')
    return messages


def _prompted(raw: Row, answers: list[str]) -> Row:
    """``prompt`` with ``completion``, or with ``chosen`` and ``rejected``: all strings or all messages."""
    strings = isinstance(raw["prompt"], str)
    row: Row = {}
    for key in ["prompt", *answers]:
        if isinstance(raw[key], str) != strings:
            raise Refused(f'"prompt" and "{key}" must both be strings or both be lists of messages')
        row[key] = _nonempty(raw[key], f'"{key}"') if strings else _messages(raw[key], f'"{key}"')
        if key != "prompt" and not strings and row[key][-1]["role"] != "assistant":
            raise Refused(f'"{key}" must end with an assistant message')
    if "chosen" in row and row["chosen"] == row["rejected"]:
        raise Refused('"chosen" and "rejected" are the same; remove the row')
    return row


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Refused(f"{name} must be a non-empty list of messages, not {_json_type(value)}")
    return [_message(message, f"message {at} of {name}") for at, message in enumerate(value, start=1)]


def _message(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        raise Refused(f'{name} must be {{"role", "content"}} and nothing else')
    if value["role"] not in ROLES:
        raise Refused(f"{name} has the role {value['role']!r}; roles are {', '.join(ROLES)}")
    return {"role": value["role"], "content": _nonempty(value["content"], f"content of {name}")}


def messages_of(value: Any) -> list[dict[str, str]]:
    """Validated chat messages of a test item; ``Refused`` says what is wrong."""
    return _messages(value, '"messages"')


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
