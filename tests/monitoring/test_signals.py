"""Signals: recorded with their reason, taken back only while pending."""

from __future__ import annotations

import pytest

import meristem as ms
from meristem.errors import BadInput
from meristem.monitoring.signals import KINDS


@pytest.fixture
def ws(fresh):
    ws = ms.Workspace.open(fresh, actor="kim")
    yield ws
    ws.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recorded_with_its_data(ws, kind):
    entry = ws.signal(kind, "support", data=["a", "a"], note="because")
    assert (entry.id, entry.status) == ("signal-1", "pending")
    assert entry.record.data == [ws.asset("dataset", "a").digest] and entry.record.note == "because"
    event = list(ws.events())[-1]
    assert (event.kind, event.actor, event.reason) == ("signal.opened", "kim", "because")


def test_unknown_kinds_models_and_data_are_refused(ws):
    with pytest.raises(BadInput, match="unknown signal kind 'rain'"):
        ws.signal("rain", "support")
    with pytest.raises(BadInput, match="unknown model"):
        ws.signal("incident", "nobody")
    with pytest.raises(BadInput, match="unknown dataset 'z'"):
        ws.signal("incident", "support", data=["z"])
    assert ws.records("signal") == []


def test_a_signal_is_taken_back_only_while_pending(ws):
    ws.signal("incident", "support")
    assert ws.close_signal("signal-1", "a mistake").status == "closed"
    assert ws.plan("support") is None and list(ws.events())[-1].reason == "a mistake"
    with pytest.raises(BadInput, match="signal-1 is closed"):
        ws.close_signal("signal-1", "again")
    ws.signal("incident", "support")
    ws.plan("support")
    with pytest.raises(BadInput, match="signal-2 is planned"):
        ws.close_signal("signal-2", "too late")
    assert ws.verify().intact
