"""The scripts in docs/examples run as they stand, and the documentation shows them as they are."""

from __future__ import annotations

import difflib
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import datasets
import torch
from tests.tiny import tiny_model
from tests.training.stream import rows

DOCS = Path(__file__).parents[2] / "docs"
PLAIN, CONTINUAL = DOCS / "examples/trl_sft.py", DOCS / "examples/trl_sft_continual.py"
ARGUMENTS = {
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "disable_tqdm": "true",
    "save_strategy": "no",
    "logging_steps": "1",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "2",
    "learning_rate": "5e-3",
    "use_peft": "true",
    "lora_target_modules": "all-linear",
}


def ran(script, folder, monkeypatch):
    """The script's variables after it ran in ``folder`` as a program."""
    paths = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "output_dir": folder / "out",
    }
    words = [f"--{key}={value}" for key, value in (ARGUMENTS | paths).items()]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    return runpy.run_path(str(script), run_name="__main__")


def test_five_lines_add_replay_and_ewc_to_trls_sft_script(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for path, given in (("data/train.jsonl", rows(18, "B")), ("earlier.jsonl", rows(8, "A"))):
        lines = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in given]
        (tmp_path / path).write_text("\n".join(lines) + "\n")

    plain = ran(PLAIN, tmp_path, monkeypatch)["trainer"].state.log_history
    assert not any("ewc/penalty" in entry for entry in plain)
    trainer = ran(CONTINUAL, tmp_path, monkeypatch)["trainer"]
    assert Counter(trainer.train_dataset["task"]) == {"task": 18, "earlier": 2}  # ratio 0.1
    log = trainer.state.log_history
    assert [entries[-1]["step"] for entries in (plain, log)] == [9, 10]  # the replayed rows took part
    assert max(e.get("num_tokens", 0) for e in log) > max(e.get("num_tokens", 0) for e in plain)
    penalties = [entry["ewc/penalty"] for entry in log if "ewc/penalty" in entry]
    assert len(penalties) == 10 and penalties[0] == 0 and penalties[-1] > 0  # it starts on its anchor
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_the_two_scripts_differ_in_five_lines_at_most():
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in (PLAIN, CONTINUAL))
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = sum(max(b - a, d - c) for tag, a, b, c, d in blocks if tag != "equal")
    assert 0 < changed <= 5, [(tag, after[c:d]) for tag, a, b, c, d in blocks if tag != "equal"]


def test_the_documentation_shows_the_script():
    assert f"```python\n{CONTINUAL.read_text(encoding='utf-8')}```\n" in (DOCS / "methods.md").read_text(
        encoding="utf-8"
    )
