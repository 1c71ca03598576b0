"""``meristem method`` as a user types it."""

from __future__ import annotations

import json

from meristem.methods import available
from meristem.methods.facts import all_facts
from meristem.methods.settings import best_known


def test_the_list_has_what_helps_to_choose(cli):
    told = json.loads(cli(None, "method", "list", "--json").out)
    assert told == json.loads(json.dumps({n: f.to_document() for n, f in all_facts().items()}))
    assert told["ewc"]["weight_copies"] == 2 and told["ewc"]["trainers"] == ["Trainer", "SFTTrainer"]
    text = cli(None, "method", "list").out
    assert all(name in text for name in available()) and "old data?" in text


def test_a_method_is_shown_with_facts_and_settings(cli):
    known, text = best_known("ewc"), cli(None, "method", "show", "ewc").out
    assert "Kirkpatrick" in text and "held while training: 2 x the trained weights" in text
    assert "--method ewc:best" in text and known.found.command in text and "one seed" in text
    for trial in known.found.tried:
        assert f"{trial.method}: ACC {trial.acc:.3f}, BWT {trial.bwt:+.3f}" in text
    told = json.loads(cli(None, "method", "show", "ewc", "--json").out)
    assert told["settings"] == known.to_document() and told["old_data"] == "first"
    bare = cli(None, "method", "show", "joint")
    assert "best-known settings: none yet" in bare.out
    wrong = cli(None, "method", "show", "ewd")
    assert wrong.code == 2 and "did you mean 'ewc'" in wrong.err
