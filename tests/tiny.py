"""A tiny Llama with a tokenizer, built on the spot, and a stream of three tasks that fight over its weights."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Any:
    """One token per byte, so any text can be tokenized; ChatML-like template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """Saves a random Llama of about 9,000 parameters and its tokenizer to ``folder``; returns the folder."""
    folder = Path(folder)
    new_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def new_model(seed: int = 0) -> Any:
    """The same random Llama, in memory; leaves the global random state alone."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config())


@cache
def _answers(task: str, keys: str) -> dict[str, str]:
    return {key: random.Random(f"{task}/{key}").choice("0123456789") for key in keys}


def three_tasks(keys: str = "abcdef") -> dict[str, list[dict[str, Any]]]:
    """Prompt/completion rows of tasks A, B, C: each maps the same keys to other digits (``"A:a=" -> "7"``).

    The task letter stands in the prompt, so all three can be learnt together; one after the other they
    overwrite each other.
    """
    return {
        task: [
            {"id": f"{task}-{key}", "task": task, "prompt": f"{task}:{key}=", "completion": answer}
            for key, answer in _answers(task, keys).items()
        ]
        for task in "ABC"
    }
