"""Numbers that others published for the standard streams, as shares (0.758 = 75.8 %), for reading beside one's own.

They are of other models, budgets and prompts than a run here; nothing is computed from them. ``mark`` says how the
number was checked: ``secondary`` was read in a text that quotes it, ``recall`` is from memory and unverified.

Signs: TRACE and TreeLoRA print BWT as a magnitude of forgetting. ``printed`` is what stands in the table of the paper,
``bwt`` the reading in this project's sign (negative = forgetting), None where the printed sign is not clear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mark = Literal["secondary", "recall"]


@dataclass(frozen=True)
class Published:
    stream: str
    method: str
    model: str
    acc: float
    mark: Mark = "secondary"
    printed: str | None = None
    bwt: float | None = None
    note: str = ""


STREAMS = {
    "standard-4": "standard CL benchmark, 4 tasks, mean of orders 1-3",
    "long-15": "15 tasks, mean of orders 4-6",
    "trace": "TRACE, 8 tasks",
    "mtl5": "the same 4 tasks with classification heads (MoE-CL), mean of orders 1-3",
    "tencent3": "Tencent3",
}
_T5, _LLAMA, _CHAT = "T5-large", "Llama-2-7B", "Llama-2-7B-Chat"
_ID = "needs the task id at inference"
_LEAK = "its prompts carry task and data-set names"
_MAGNITUDE = "printed as a magnitude of forgetting"

NUMBERS = (
    Published("standard-4", "sequential fine-tuning", _T5, 0.285, "recall"),
    Published("standard-4", "O-LoRA", _T5, 0.758, note=_LEAK),
    Published(
        "standard-4", "O-LoRA", "Llama-7B", 0.761, note=f"{_LEAK}; users report .35 to .43 with Llama-2"
    ),
    Published("standard-4", "Progressive Prompts", _T5, 0.751, note=_ID),
    Published("standard-4", "MoCL", _LLAMA, 0.782),
    Published("standard-4", "OSF", _T5, 0.759),
    Published("standard-4", "OSF", _LLAMA, 0.796),
    Published("standard-4", "per-task fine-tuning", _T5, 0.700, "recall"),
    Published("standard-4", "joint training", _T5, 0.800),
    Published("long-15", "sequential fine-tuning", _T5, 0.074, "recall"),
    Published("long-15", "O-LoRA", _T5, 0.696, note=_LEAK),
    Published("long-15", "O-LoRA", "Llama-7B", 0.735, note=f"re-run by others; {_LEAK}"),
    Published("long-15", "Progressive Prompts", _T5, 0.779, note=_ID),
    Published("long-15", "SAPT-LoRA", _CHAT, 0.819, printed="-2.9", bwt=-0.029, note="re-run; pseudo-replay"),
    Published("long-15", "SAPT-LoRA", _T5, 0.820, "recall", note="pseudo-replay"),
    Published("long-15", "MoCL", _LLAMA, 0.752, note="one order"),
    Published("long-15", "OSF", _T5, 0.713),
    Published("long-15", "per-task fine-tuning", _T5, 0.781),
    Published("long-15", "joint training", _T5, 0.765),
    Published("trace", "sequential fine-tuning", _CHAT, 0.487, printed="-8.3", note="sign as printed"),
    Published("trace", "LoRA", _CHAT, 0.127, printed="-45.7", note="sign as printed"),
    Published("trace", "replay", _CHAT, 0.555, printed="+2.6", note="sign as printed"),
    Published("trace", "in-context learning", _CHAT, 0.389),
    Published("trace", "O-LoRA", _CHAT, 0.413, printed="6.2", bwt=-0.062, note=_MAGNITUDE),
    Published("trace", "Progressive Prompts", _CHAT, 0.462, printed="2.3", bwt=-0.023, note=_MAGNITUDE),
    Published("trace", "TreeLoRA", "Mistral-7B", 0.548, printed="3.8", bwt=-0.038, note=_MAGNITUDE),
    Published("trace", "TreeLoRA", _LLAMA, 0.435, printed="3.5", bwt=-0.035, note=_MAGNITUDE),
    Published("trace", "TreeLoRA", "Llama-3.2-1B", 0.361, printed="7.4", bwt=-0.074, note=_MAGNITUDE),
    Published("trace", "TreeLoRA", "Gemma-2B", 0.334, printed="8.5", bwt=-0.085, note=_MAGNITUDE),
    Published("trace", "OSF", _CHAT, 0.484, printed="7.1", bwt=-0.071, note=_MAGNITUDE),
    Published("trace", "per-task fine-tuning", _CHAT, 0.576),
    Published("trace", "joint training", _CHAT, 0.523),
    Published("mtl5", "sequential fine-tuning", _LLAMA, 0.267),
    Published("mtl5", "per-task fine-tuning", _LLAMA, 0.766),
    Published("mtl5", "O-LoRA", _LLAMA, 0.761),
    Published("mtl5", "MoCL", _LLAMA, 0.782),
    Published("mtl5", "MoE-CL", _LLAMA, 0.805, note=f"81.1 / 81.9 / 78.4 by order; {_ID}"),
    Published("tencent3", "per-task fine-tuning", "as MoE-CL", 0.533, printed="-.159", bwt=-0.159),
    Published("tencent3", "sequential fine-tuning", "as MoE-CL", 0.607, printed="-.030", bwt=-0.030),
    Published("tencent3", "O-LoRA", "as MoE-CL", 0.595, printed="-.022", bwt=-0.022, note=_LEAK),
    Published("tencent3", "MoCL", "as MoE-CL", 0.592, printed="-.049", bwt=-0.049),
    Published("tencent3", "MoE-CL", "as MoE-CL", 0.634, printed="-.035", bwt=-0.035, note=_ID),
)


def of_stream(stream: str | None) -> list[Published]:
    return [number for number in NUMBERS if number.stream == stream]
