"""What a model's attention allows: read from its class and configuration, never tried out."""

from __future__ import annotations

import inspect
import math
from typing import Any

WITH_MASK = {"full_attention", "sliding_attention"}


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(base_model(model).forward).parameters


def tree_span(model: Any) -> float:
    """Longest sequence (tokens) that may be one branch of a row under a tree mask; 0: never, inf: any.

    A tree mask (B, 1, W, W) needs attention that takes it as it is (transformers' attention interface), positions
    that can be given, and no adapter that looks at the sequence as a whole. A sliding window changes nothing for
    sequences that fit into it.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    if not keeps_plain_cache(model) or _whole_sequence_adapter(model):
        return 0
    if not getattr(base, "_supports_attention_backend", False) or not accepts(model, "position_ids"):
        return 0
    if config._attn_implementation not in ("sdpa", "eager"):
        return 0
    return sliding_window(config) or math.inf


def keeps_plain_cache(model: Any) -> bool:
    """Whether all layers attend over keys and values of earlier tokens, and nothing but tokens comes before them."""
    base = base_model(model)
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    stateful = getattr(base, "_is_stateful", False)  # recurrent layers, alone or among others
    return layers <= WITH_MASK and not stateful and not _prompt_learning(model)


def sliding_window(config: Any) -> int | None:
    """Tokens that a sliding layer sees, ``None`` without such layers."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _adapters(model: Any) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())


def _prompt_learning(model: Any) -> bool:
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in _adapters(model))


def _whole_sequence_adapter(model: Any) -> bool:
    """Activated LoRA switches on behind a run of tokens that it looks for in the whole row."""
    return any(getattr(adapter, "alora_invocation_tokens", None) for adapter in _adapters(model))
