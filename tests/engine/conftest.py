"""Tiny models of several architectures with a byte-level tokenizer, built here from nothing."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
)

from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat=True):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<end>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def make_model(seed=0, scale=0.15):
    """Wider weights than usual: a tiny model with the default ones finds every answer equally likely."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=scale,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = 24


def _built(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _with_adapter(adapter):
    from peft import get_peft_model

    model = get_peft_model(make_model(), adapter)
    torch.manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _prefix():
    from peft import PrefixTuningConfig

    return _with_adapter(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def _prompt():
    from peft import PromptTuningConfig

    return _with_adapter(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def _lora():
    from peft import LoraConfig

    return _with_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


ARCHITECTURES = {
    "llama": make_model,
    "lora": _lora,
    "gpt2": lambda: _built(  # learned positions
        GPT2Config(
            vocab_size=258,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            initializer_range=0.15,
            eos_token_id=1,
        )
    ),
    "gemma2": lambda: _built(
        Gemma2Config(**SIZES, sliding_window=WINDOW), "eager"
    ),  # caps its logits; no sdpa
    "gemma3": lambda: _built(
        Gemma3TextConfig(
            **SIZES,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            use_cache=True,
        )
    ),
    "mistral": lambda: _built(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "mpt": lambda: _built(  # positions only as attention biases
        MptConfig(vocab_size=258, d_model=32, n_layers=2, n_heads=4, initializer_range=0.15), "eager"
    ),
    "mamba": lambda: _built(  # recurrent
        MambaConfig(
            vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.15
        ),
        "eager",
    ),
    "prefix tuning": _prefix,
    "prompt tuning": _prompt,
}


class Notebook:
    """A journal in memory, by way of JSON; ``limit`` batches, then the process "dies"."""

    def __init__(self, limit=None):
        self.pages, self.limit = {}, limit

    def get(self, batch):
        return json.loads(self.pages[batch]) if batch in self.pages else None

    def put(self, batch, values):
        assert batch not in self.pages, "a batch that is there is not computed again"
        if len(self.pages) == self.limit:
            raise KeyboardInterrupt
        self.pages[batch] = json.dumps(values)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def engine(tokenizer):
    return wrap(make_model(), tokenizer, EngineSettings(dtype="float32", batch_tokens=96))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """A plain folder, an adapter folder over it with weights that matter, and the adapter's model."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    base = LlamaForCausalLM.from_pretrained(root / "base")
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"
