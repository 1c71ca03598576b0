"""Load a version, plain or adapter, ready to score and generate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from meristem import experts_format
from meristem.config import known_device
from meristem.engine.identity import EngineSettings, engine_digest
from meristem.errors import BadInput
from meristem.methods.base import MethodState
from meristem.store.canonical import digest_document

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>")


@dataclass(frozen=True)
class Engine:
    """A model in eval mode with its tokenizer.

    ``stop_ids`` end a generation: the model's end-of-sequence tokens and the chat format's end of turn.
    ``max_length`` is the longest sequence the model was built for, ``None`` when it does not say.
    """

    model: Any
    tokenizer: Any
    settings: EngineSettings
    stop_ids: tuple[int, ...]
    max_length: int | None

    @property
    def digest(self) -> str:
        return engine_digest(self.settings)

    @property
    def template(self) -> str | None:
        """Digest of the chat template that prompts go through; ``None`` without one."""
        found = self.tokenizer.chat_template
        return None if found is None else digest_document(found)

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is masked, its value never reaches a result."""
        return int(self.tokenizer.pad_token_id or 0)


def load(
    folder: str | Path,
    *,
    base_folder: str | Path | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    batch_tokens: int = EngineSettings.batch_tokens,
    expert: str | None = None,
) -> Engine:
    """Load a Hugging Face folder, or over ``base_folder`` a PEFT adapter folder or one of experts.

    ``expert``: the task whose expert answers everything, whatever a router would say.

    Weights come from safetensors only and nothing is fetched from a hub. An adapter stays unmerged:
    merging rounds the weights, and what is scored must be what is served. It is loaded as plain PEFT
    does (fp32 adapter weights over a half-precision base), so that a checkout answers the same. The tokenizer is the
    adapter's own when its folder has one, in training as well (``load_for_training``).
    """
    folder = Path(folder)
    _check_settings(dtype, device, batch_tokens)
    experts = (folder / experts_format.CONFIG).is_file()
    if experts or (folder / "adapter_config.json").is_file():
        if base_folder is None:
            raise BadInput.at(folder, None, "an adapter folder needs base_folder, the folder of its base")
        load_on = _load_experts if experts else _load_adapter
        model = load_on(folder, Path(base_folder), DTYPES[dtype])
    else:
        if base_folder is not None:
            raise BadInput.at(folder, None, "base_folder given, but this is no adapter folder; leave it out")
        model = _load_plain(folder, DTYPES[dtype])
    if expert is not None:
        _answer_by(model, expert, folder)
    tokenizer = _load_tokenizer(folder, base_folder)
    return wrap(model.to(device), tokenizer, EngineSettings(dtype, device, "sdpa", batch_tokens, expert))


def wrap(model: Any, tokenizer: Any, settings: EngineSettings) -> Engine:
    """An engine around a model that is already in memory (puts it into eval mode)."""
    return wrapped(model, tokenizer, settings)[0]


def wrapped(model: Any, tokenizer: Any, settings: EngineSettings) -> tuple[Engine, RemovableHandle]:
    """``wrap``, and the handle of the hook that it leaves on the model."""
    stop_ids = _stop_ids(model, tokenizer)
    # sampling settings shipped with a model (temperature, repetition penalty) must not reach a measurement
    getattr(model, "get_base_model", lambda: model)().generation_config = GenerationConfig()
    model.eval()
    # The last position's hidden states are a strided view; multiplied as such with a head that needs no gradient
    # (any PEFT model's), torch falls back to bmm and copies the head once per row of the batch.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return Engine(model, tokenizer, settings, stop_ids, longest), hook


def _check_settings(dtype: str, device: str, batch_tokens: int) -> None:
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if batch_tokens < 1:
        raise BadInput(f"batch_tokens must be at least 1, not {batch_tokens}")
    try:
        kind, _, index = known_device(device).partition(":")
    except ValueError as error:
        raise BadInput(f"device {device!r}: {error}") from error
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device {device!r}: {torch.cuda.device_count() or 'no'} CUDA devices here; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"device {device!r}: no such device here; use cpu")


def _load_plain(folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise BadInput.at(folder, None, "not a Hugging Face model folder (no config.json)")
    try:
        return _from_pretrained(folder, dtype, "sdpa")
    except (OSError, ValueError) as error:
        if "scaled_dot_product_attention" not in str(error):
            raise BadInput.at(folder, None, f"cannot be loaded: {_first_line(error)}") from error
        return _from_pretrained(folder, dtype, "eager")  # an architecture without it


def _from_pretrained(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def _load_adapter(folder: Path, base_folder: Path, dtype: torch.dtype) -> Any:
    # PEFT would fall back to unpickling adapter_model.bin
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput.at(folder, None, "no adapter_model.safetensors; save the adapter as safetensors")
    from peft import PeftModel

    base = _load_plain(base_folder, dtype)
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        message = f"the adapter does not fit {base_folder}: {_first_line(error)}"
        raise BadInput.at(folder, None, message) from error


def _load_experts(folder: Path, base_folder: Path, dtype: torch.dtype) -> Any:
    """The base with experts on it that every forward is routed to (``methods.architecture.experts``)."""
    from meristem.methods.architecture.experts import Experts
    from meristem.methods.architecture.task_experts import experts_in, shared_in

    model = _load_plain(base_folder, dtype)
    document, state = _read_experts(folder)
    experts, shared = experts_in(state), shared_in(state)
    if document.gates == "ffn":
        from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts, ffn_gates_in

        FfnExperts(model, document.router, experts, shared=shared, gates=ffn_gates_in(state))
    else:
        Experts(model, document.router, experts, shared=shared)
    return model


def _answer_by(model: Any, task: str, folder: Path) -> None:
    from meristem.methods.architecture.experts import of

    attached = of(model)
    if attached is None:
        raise BadInput.at(
            folder, None, f"no experts in this version, so none of task {task!r}: leave expert out"
        )
    attached.pin = attached.place_of(task)


def expert_state(folder: Path) -> MethodState:
    """What a version of experts says and holds, as the state of the method that made it."""
    return _read_experts(folder)[1]


def _read_experts(folder: Path) -> tuple[experts_format.Document, MethodState]:
    path = folder / experts_format.WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput.at(path, None, f"cannot be read: {_first_line(error)}") from error
    place = folder / experts_format.CONFIG
    document = experts_format.parse(place, place.read_bytes(), tensors)
    about: dict[str, Any] = {"experts": [expert.model_dump() for expert in document.experts]}
    if document.shared is not None:
        about["shared"] = document.shared.model_dump()
    if document.router.depth is not None:
        about["depth"] = document.router.depth
    return document, {"tensors": tensors, "json": about}


def _load_tokenizer(folder: Path, base_folder: str | Path | None) -> Any:
    """The folder's own tokenizer and chat template; those of the base when an adapter brings none."""
    if base_folder is not None and not (folder / "tokenizer_config.json").is_file():
        folder = Path(base_folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput.at(folder, None, f"no usable tokenizer: {_first_line(error)}") from error


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary.get(token) for token in END_OF_TURN}
    return tuple(sorted(int(token) for token in found if token is not None))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def load_for_training(
    folder: Path, base_folder: Path | None, dtype: str, device: str = "cpu", base_only: bool = False
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a folder in train mode; an adapter comes trainable, with fp32 weights.

    With ``base_only`` the base's model alone, which is where a new adapter goes beside or instead of the old.
    """
    _check_settings(dtype, device, EngineSettings.batch_tokens)
    if base_folder is None or base_only:
        return _load_plain(base_folder or folder, DTYPES[dtype]).to(device), _load_tokenizer(
            folder, base_folder
        )
    if (folder / experts_format.CONFIG).is_file():
        raise BadInput.at(folder, None, "a set of experts is not trained on; a method adds one beside them")
    from peft import PeftModel

    base = _load_plain(base_folder, DTYPES[dtype])
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    return model.to(device), _load_tokenizer(folder, base_folder)
