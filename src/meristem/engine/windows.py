"""Long texts as windows that a model of bounded length can score."""

from __future__ import annotations

from collections.abc import Sequence

from meristem.errors import BadInput


def rolling_windows(
    tokens: Sequence[int], prefix_token: int, max_length: int, context: int = 1
) -> list[tuple[list[int], list[int]]]:
    """``(context tokens, tokens to predict)`` windows; every token of ``tokens`` is predicted exactly once.

    The same windows as lm-evaluation-harness's ``get_rolling_token_windows`` after ``make_disjoint_window``: the
    first has ``prefix_token`` (end or beginning of text) as its context and predicts ``max_length`` tokens; later ones
    see at least ``context`` tokens before what they predict. The last token of a window is predicted and never fed,
    so a window holds up to ``max_length + 1`` tokens.
    """
    if not 1 <= context <= max_length:
        raise BadInput(f"a window needs 1 to max_length ({max_length}) tokens of context, not {context}")
    found = [([prefix_token], list(tokens[:max_length]))] if tokens else []
    start = max_length
    while start < len(tokens):
        end = min(start + max_length - context + 1, len(tokens))
        found.append((list(tokens[end - max_length - 1 : start]), list(tokens[start:end])))
        start = end
    return found
