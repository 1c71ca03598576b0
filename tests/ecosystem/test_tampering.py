"""A sample of ``benchmarks/tamper_sweep.py``, so that CI keeps the full sweep running and its claims true."""

from __future__ import annotations

import random

import pytest
from benchmarks import tamper_sweep


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    made = tamper_sweep.prepare(tmp_path_factory.mktemp("tampering"))
    yield made
    made.store.database.close()


def test_every_byte_of_some_events_and_documents_and_of_all_signatures_counts(subject, monkeypatch):
    monkeypatch.setattr(tamper_sweep, "ATTACKS", {})
    found = tamper_sweep.sweep(
        subject, random.Random(0), pack_bytes=200, only=lambda number: number % 12 == 1
    )
    assert found["missed"] == 0, found
    flips = {name: part["flips"] for name, part in found["parts"].items()}
    assert flips["packs"] == 200 and flips["events"] > 2000 and flips["documents"] > 200
    assert flips["checkpoints"] > 2 * (64 + 300) and flips["key signatures"] >= 2 * 128
    assert (
        sum(part["whole"] for part in found["parts"].values()) > 30
    )  # some went through the whole of verify


@pytest.mark.parametrize("attack", tamper_sweep.ATTACKS, ids=lambda attack: attack.__name__)
def test_attacks_that_keep_every_hash_right_are_found_with_an_anchor(subject, attack):
    found = tamper_sweep.attacked(subject, attack, tamper_sweep.ATTACKS[attack])
    assert found["as_expected"], found


def test_the_result_file_and_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(tamper_sweep, "sweep", lambda *_, **__: {"flips": 1, "missed": 1, "attacks": []})
    assert tamper_sweep.main(["--out", str(tmp_path / "results" / "a.json")]) == 1
    assert '"missed": 1' in (tmp_path / "results" / "a.json").read_text()
