"""Plans, their journal, and windows over long texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import Notebook

from meristem.engine.batching import plan, run_batches
from meristem.engine.windows import rolling_windows
from meristem.errors import BadInput


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), max_size=60),
    st.integers(1, 200),
    st.integers(1, 9),
)
def test_plan_is_a_bounded_permutation_with_an_inverse(sizes, bound, rows):
    lengths, outputs = [length for length, _ in sizes], [wanted for _, wanted in sizes]
    made = plan(lengths, bound, rows, outputs=outputs, max_outputs=20)
    assert sorted(made.order()) == list(range(len(lengths)))
    assert made == plan(lengths, bound, rows, outputs=outputs, max_outputs=20)
    for batch in made.batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= bound
        assert len(batch) == 1 or len(batch) * max(outputs[i] for i in batch) <= 20
    values = [f"item {i}" for i in made.order()]
    assert made.restore(values) == [f"item {i}" for i in range(len(lengths))]


def test_batches_run_once_and_report():
    made = plan([5, 9, 7, 2], 12)
    journal, seen, computed = Notebook(), [], []

    def compute(batch):
        computed.append(batch)
        return [[index, index / 3] for index in batch]

    first = run_batches(made, compute, journal, lambda done, total: seen.append((done, total)))
    assert first == [[index, index / 3] for index in range(4)]
    assert computed == list(made.batches) and seen[-1] == (4, 4)
    assert run_batches(made, compute, journal) == first
    assert len(computed) == len(made.batches)


@settings(deadline=None)  # the first example imports the harness
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_equal_the_harness(count, longest, context):
    utils = pytest.importorskip("lm_eval.utils")
    tokens, context = list(range(100, 100 + count)), min(context, longest)
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 7, longest, context))
    found = rolling_windows(tokens, 7, longest, context)
    assert found == list(theirs)
    assert [token for _, predicted in found for token in predicted] == tokens
    assert all(len(seen) + len(predicted) <= longest + 1 for seen, predicted in found)


def test_windows_need_room_for_their_context():
    with pytest.raises(BadInput, match="1 to max_length"):
        rolling_windows([1], 0, 4, 5)
