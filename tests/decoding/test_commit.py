"""Which tokens become final: properties, and a naive oracle."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from vectors import arrays

from vidlada.decoding.commit import above_threshold, by_factor, most_confident, spread

BLOCKS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def tensors(block):
    confidence, is_open = zip(*block, strict=True)
    assume(any(is_open))
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(is_open)


def test_recorded_schedules():
    for row, (masks, steps) in zip(arrays("mha")["schedule"], [(32, 32), (32, 12), (32, 5), (8, 3), (7, 4)],
                                   strict=True):  # fmt: skip
        assert spread(masks, steps) == row[:steps].tolist()


@given(st.integers(0, 200), st.integers(1, 200))
def test_spread_is_even_and_complete(masked, steps):
    plan = spread(masked, steps)
    assert len(plan) == steps
    assert sum(plan) == masked
    assert plan == sorted(plan, reverse=True)
    assert max(plan) - min(plan) <= 1


@given(BLOCKS, st.integers(1, 50))
def test_most_confident(block, count):
    confidence, is_open = tensors(block)
    chosen = most_confident(confidence, is_open, count)
    assert not (chosen & ~is_open).any()
    assert chosen.sum() == min(count, is_open.sum())
    left = is_open & ~chosen
    if left.any():
        assert confidence[chosen].min() >= confidence[left].max()


@given(BLOCKS, st.floats(0.01, 1))
def test_threshold(block, threshold):
    confidence, is_open = tensors(block)
    chosen = above_threshold(confidence, is_open, threshold)
    expected = {i for i, (value, is_open) in enumerate(block) if is_open and value > threshold}
    found = set(np.flatnonzero(chosen.numpy()).tolist())
    assert found == expected if expected else len(found) == 1 and is_open[list(found)].all()


@given(BLOCKS, st.floats(0.01, 4))
def test_factor(block, factor):
    confidence, is_open = tensors(block)
    chosen = by_factor(confidence, is_open, factor)
    ranked = sorted((value for value, is_open in block if is_open), reverse=True)
    largest = 1
    for n in range(1, len(ranked) + 1):
        if (n + 1) * (1 - ranked[n - 1]) < factor:
            largest = n
    assert int(chosen.sum()) == largest
    assert not (chosen & ~is_open).any()
