"""The embedded LLM, for real: training, release, checkout and rollback on SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import meristem as ms
from meristem.demo.story import DATA
from meristem.ecosystem import folders, versions
from meristem.store.canonical import digest_bytes

pytestmark = pytest.mark.llm

RECIPE = {"learning_rate": 1e-3, "max_steps": 6, "batch_size": 4, "lora": {"rank": 4, "layers": 0.2}}
# Six items settle little; how gates judge is tested elsewhere.
POLICY = """\
schema: meristem/workspace/v1
defaults: {gates: [{gate: non_inferiority, suites: all, margin: 0.99}]}
"""


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> ms.Workspace:
    """A support model on the embedded LLM after one short update on a slice of the demo's data."""
    root = tmp_path_factory.mktemp("embedded")
    (root / "ws").mkdir()
    (root / "ws" / "meristem.yaml").write_text(POLICY)
    made = ms.Workspace.create(root / "ws", actor="test")
    made.add_model("smollm2", tier="foundation", source="embedded")
    made.add_model("support", tier="industrial", base="smollm2")
    train = (DATA / "order-extraction.train.jsonl").read_text().splitlines()[:24]
    test = (DATA / "order-extraction.test.jsonl").read_text().splitlines()[:6]
    (root / "train.jsonl").write_text("\n".join(train))
    (root / "order-extraction.test.jsonl").write_text("\n".join(test))
    (root / "suite.yaml").write_text((DATA / "order-extraction.suite.yaml").read_text())
    made.add_data("orders", root / "train.jsonl")
    made.add_suite("orders", root / "suite.yaml")
    made.update("support", data=["orders"], recipe=RECIPE)
    return made


def test_an_update_stores_only_its_adapter(ws: ms.Workspace) -> None:
    with ws.store.database.read() as connection:
        base = versions.content_of(connection, ws.version("support@v1").content)
        tuned = versions.content_of(connection, ws.version("support@v2").content)
    assert (base.kind, tuned.kind, tuned.base) == ("full", "adapter", base.digest)
    assert not set(base.tensors.values()) & set(tuned.tensors.values())
    sizes = sorted(path.stat().st_size for path in (ws.root / ".meristem" / "packs").glob("*.safetensors"))
    assert sizes[-1] > 250e6
    assert all(size < 10e6 for size in sizes[:-1])


def test_a_checkout_answers_in_plain_peft_as_inside_meristem(ws: ms.Workspace, tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM on the exported folder: the same greedy answers, item by item."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    inside = {r["id"]: r["prediction"] for r in ws.results(ws.evaluate("support@v2", "orders"))}
    made = ws.checkout("support@v2", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    model = AutoPeftModelForCausalLM.from_pretrained(made.folder, dtype="bfloat16").eval()
    for line in (DATA / "order-extraction.test.jsonl").read_text().splitlines()[:6]:
        row = json.loads(line)
        question = "Copy the order number that this message is about, or say none.\n\n" + row["text"]
        messages = [
            {"role": "system", "content": "You help a support desk."},
            {"role": "user", "content": question},
        ]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert text == inside[row["id"]]


def test_a_full_checkout_loads_in_plain_transformers(ws: ms.Workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = ws.checkout("support@v1", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    with ws.store.database.read() as connection:
        content = versions.content_of(connection, ws.version("support@v1").content)
    (made.folder / "meristem.json").unlink()  # says which version it is; not part of the content
    assert folders.matches(content, made.folder)


def test_rollback_gives_the_tensors_and_logits_of_the_release(
    ws: ms.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded when the first champion stood; compared after a release and a rollback without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    recorded = served(ws, tmp_path / "before")
    ws.promote(ws.propose("support@v2"))
    assert served(ws, tmp_path / "between")["logits"] != recorded["logits"]
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ws.rollback("support", reason="try it")
    assert served(ws, tmp_path / "after") == recorded
    assert [entry.record.kind for entry in ws.history("support")] == ["promote", "rollback"]


def served(ws: ms.Workspace, folder: Path) -> dict[str, Any]:
    """Digests of every tensor of the champion, and the logits of eight greedy tokens, bit for bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = ws.checkout("support@champion", folder)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype="bfloat16").eval()
    prompt = tokenizer("The order number is", return_tensors="pt")
    out = model.generate(
        **prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with folders.ingest(made.folder, "sha256:base" if made.base_folder else None) as (content, _):
        return {
            "tensors": content.tensors,
            "tokens": out.sequences.tolist(),
            "logits": [digest_bytes(step.float().numpy().tobytes()) for step in out.logits],
        }
