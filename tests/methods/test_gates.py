"""A shared expert and gated ones in one product: against the equations row by row, token by token."""

import pytest
import torch
from safetensors.torch import save_file
from tests.methods.mixtures import DOWN, TARGETS, added, double, expert, prompts
from tests.tiny import tiny_model

from meristem.engine.load import load
from meristem.experts_format import CONFIG, WEIGHTS, Document, RouterEntry
from meristem.methods.architecture import gates
from meristem.methods.architecture.experts import Experts
from meristem.methods.architecture.gates import Gates
from meristem.methods.architecture.prototypes import hidden_features, weigh
from meristem.methods.architecture.task_experts import state_of

LAYERS = [*TARGETS[1:], DOWN]
ROWS = [prompts("B")[-1], prompts("Z")[1], prompts("A")[-2], prompts("C")[-3]]  # Z: of no known task
WIDEST = max(map(len, ROWS))
IDS = torch.tensor([[0] * (WIDEST - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (WIDEST - len(row)) + [1] * len(row) for row in ROWS])


def mixture(gate, kind=torch.float64):
    return [expert(task, LAYERS, gate, kind) for task in "ABC"], expert("shared", LAYERS, None, kind)


def router(mode="top-1"):
    return RouterEntry(
        mode=mode, temperature=30.0, metric="mahalanobis", depth=2, shrinkage=0.5, quantile=1.0
    )


def expected(experts, mode="top-1"):
    """Weights of ROWS by the router alone; top-1: rows of B, of no task, of A and of C."""
    found = hidden_features(double(), [torch.tensor(row) for row in ROWS], 2)
    weights = weigh([e.prototype for e in experts], found, mode, 30.0)
    assert (weights > 0.5).tolist()[1] == [False] * 3 and not weights[1].any()
    if mode == "top-1":
        assert weights.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    else:
        assert ((weights > 0.01).sum(1) > 1).any()  # a blend, not one expert under another name
    return weights.tolist()


def alone(shared, experts, weights, row):
    base = double().eval()
    with torch.no_grad(), added(base, shared, experts, weights):
        return base(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("mode", ["top-1", "softmax"])
@pytest.mark.parametrize("gate", ["static", "token"])
def test_a_mixed_padded_batch_is_each_row_by_the_equations(gate, mode, tmp_path):
    """In float64, and in float32 from the files of a version."""
    experts, shared = mixture(gate)
    weights = expected(experts, mode)
    model = double().eval()
    attached = Experts(model, router(mode), experts, shared=shared)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(attached.routing.weights.tolist(), weights, rtol=1e-5, atol=1e-7)
    wanted = [alone(shared, experts, w, row) for w, row in zip(weights, ROWS, strict=True)]
    bare = double().eval()
    for at, row in enumerate(ROWS):
        torch.testing.assert_close(found[at, -len(row) :], wanted[at], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(wanted[at], bare(input_ids=torch.tensor([row])).logits[0], atol=1e-4)
    experts, shared = mixture(gate, torch.float32)
    entries = [e.about for e in experts]
    document = Document(
        method="moe-cl", router=router(mode), experts=entries, shared=shared.about, gates=gate
    )
    folder = tmp_path / "version"
    folder.mkdir()
    (folder / CONFIG).write_bytes(document.body())
    save_file(state_of(experts, shared)["tensors"], folder / WEIGHTS)
    loaded = load(folder, base_folder=tiny_model(tmp_path / "base"), dtype="float32").model
    with torch.no_grad():
        again = loaded(input_ids=IDS, attention_mask=MASK).logits
    for at, row in enumerate(ROWS):
        torch.testing.assert_close(again[at, -len(row) :].double(), wanted[at], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", ["static", "token"])
def test_generation_with_a_cache_says_what_the_equations_say(gate):
    experts, shared = mixture(gate)
    weights = expected(experts)
    model = double().eval()
    model.generation_config.pad_token_id = 0
    Experts(model, router(), experts, shared=shared)
    made = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, eos_token_id=None)
    said = set()
    for row, w, answer in zip(ROWS, weights, made[:, WIDEST:].tolist(), strict=True):
        for at in range(4):
            assert answer[at] == int(alone(shared, experts, w, [*row, *answer[:at]])[-1].argmax())
        said.add(tuple(answer))
    assert len(said) > 1


def test_a_pinned_expert_answers_every_row_and_an_unknown_name_is_refused():
    experts, shared = mixture("static")
    model = double().eval()
    attached = Experts(model, router(), experts, shared=shared)
    attached.pin = attached.place_of("C")
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK).logits
    for at, row in enumerate(ROWS):
        wanted = alone(shared, experts, [0.0, 0.0, 1.0], row)
        torch.testing.assert_close(found[at, -len(row) :], wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(Exception, match="no expert of task 'X': there are A, B, C"):
        attached.place_of("X")


def test_gates_come_back_as_they_were_kept():
    """The logits that a layer is divided by, of every kind; those for ablations are closed to the bit."""
    widths = {"one": 3, "other": 5}
    for kind in ("static", "token"):
        made, again = (Gates(kind, widths, 100.0, torch.float64) for _ in range(2))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter)
        again.restore(made.kept())
        for layer in widths:
            assert not torch.equal(made.of(layer), torch.zeros_like(made.of(layer)))
            torch.testing.assert_close(again.of(layer), made.of(layer), rtol=1e-14, atol=0)
    x = torch.randn(2, 4, 3)
    for kind, wanted in (("shared-only", [1.0, 0.0]), ("task-only", [0.0, 1.0])):
        fixed = Gates(kind, widths, 100.0, torch.float32)
        assert not list(fixed.parameters()) and gates.shares(fixed.of("one")[None], x).tolist() == [wanted]
