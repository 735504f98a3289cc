"""The loop beyond the recorded vectors: batches, stops, pace, seeds, bad requests."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_requests import decode

from vidlada.decoding.running import first_occurrence
from vidlada.decoding.sampler import Denoiser, Request, denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings


def prompt(small, tokens, seed=0):
    width = small.model.config.text_config.hidden_size
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 0.2


def settings(**changes):
    return GenerationSettings(gen_length=16, block_length=8).replace(**changes)


MIXED = [
    settings(),
    settings(gen_length=32, block_length=8, steps=8),
    settings(temperature=0.7, seed=5),
    settings(cfg_scale=1.5),
    settings(threshold=0.2),
    settings(factor=2.0),
    settings(remasking="random", seed=9),
    settings(block_length=16, steps=5),
]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=12),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3),
)
def test_the_first_stop_sequence_against_a_naive_search(tokens, sequences):
    ids = [token if is_known else None for token, is_known in tokens]
    naive = [n for n in range(len(ids)) if any(ids[n : n + len(each)] == each for each in sequences)]
    numbers = np.array([token for token, _ in tokens], dtype=np.int64)
    known = np.array([is_known for _, is_known in tokens], dtype=bool)
    assert first_occurrence(numbers, known, sequences) == next(iter(naive), None)


def test_a_request_in_a_batch_gives_the_answer_it_gives_alone(small):
    requests = [Request(prompt(small, 5 + 7 * i, i), chosen) for i, chosen in enumerate(MIXED)]
    together = decode(small.model, *requests)
    for request, state in zip(requests, together, strict=True):
        (alone,) = decode(small.model, request)
        assert state.answer_ids() == alone.answer_ids()
        assert state.statistics.steps == alone.statistics.steps
        assert state.statistics.forward_passes == alone.statistics.forward_passes


def test_a_request_may_join_while_another_runs(small):
    first, second = Request(prompt(small, 30), settings()), Request(prompt(small, 9, 1), settings())
    denoiser = Denoiser(small.model)
    denoiser.add(first)
    states = {}
    for _ in range(5):
        states.update(denoiser.step())
    denoiser.add(second)
    while denoiser.rows:
        states.update(denoiser.step())
    for number, request in enumerate((first, second)):
        assert states[number].answer_ids() == decode(small.model, request)[0].answer_ids()


def test_seeds_decide(small):
    answers = [
        decode(small.model, Request(prompt(small, 9), settings(temperature=1.0, seed=seed)))[0].answer_ids()
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_suppressed_tokens_and_the_mask_never_appear(small):
    states = decode(small.model, *(Request(prompt(small, 9, i), settings(temperature=1.0, seed=i)) for i in range(4)))
    suppressed = set(small.model.config.suppressed_token_ids)
    assert not suppressed & {token for state in states for token in state.answer_ids()}


def test_states_only_grow(small):
    before = None
    for _, state in denoise(small.model, [Request(prompt(small, 9), settings(threshold=0.15))]):
        if before is not None:
            assert state.step == before.step + 1
            assert (state.committed | ~before.committed).all()
            assert (state.proposed[before.committed] == before.proposed[before.committed]).all()
        before = state
    assert before.done


def test_threshold_takes_fewer_steps_and_reports_them(small):
    plain, fast = decode(small.model, Request(prompt(small, 9), settings()),
                         Request(prompt(small, 9), settings(threshold=0.05)))  # fmt: skip
    assert plain.statistics.steps == 16
    assert fast.statistics.steps < 16
    assert fast.statistics.tokens_per_forward == 16 / fast.statistics.forward_passes


def test_stop_ends_early_with_everything_before_it_decided(small):
    free = decode(small.model, Request(prompt(small, 9), settings()))[0].answer_ids()
    for place in range(1, 8):
        sequence = tuple(free[place : place + 2])
        (state,) = decode(small.model, Request(prompt(small, 9), settings(), stop_sequences=[sequence]))
        assert state.done
        assert state.stop_at is not None
        assert tuple(state.proposed[state.stop_at : state.stop_at + 2].tolist()) == sequence
        assert len(state.answer_ids()) == state.stop_at  # nothing before it is open
        assert state.statistics.steps <= 16
        assert not state.committed[8:].any() or state.stop_at + 2 > 8  # the second block was not begun


def test_the_earliest_of_several_stops_counts_whatever_their_order(small):
    free = decode(small.model, Request(prompt(small, 9), settings()))[0].answer_ids()
    stops = [(free[6],), (free[3],)]
    expected = min(free.index(free[6]), free.index(free[3]))
    for order in (stops, stops[::-1]):
        (state,) = decode(small.model, Request(prompt(small, 9), settings(), stop_sequences=order))
        assert state.stop_at == expected


def test_committed_tokens_before_a_stop_are_never_overwritten(small):
    # the published loop commits -inf positions when fewer candidates than tokens are left (G1)
    free = decode(small.model, Request(prompt(small, 9), settings(steps=4)))[0].answer_ids()
    for token in set(free):
        seen = {}
        for _, state in denoise(small.model, [Request(prompt(small, 9), settings(steps=4), stop_sequences=[(token,)])]):
            for slot, value in enumerate(state.proposed.tolist()):
                if state.committed[slot]:
                    assert seen.setdefault(slot, value) == value


def test_infilling_keeps_what_is_given(small):
    mask = small.model.config.mask_token_id
    given = [50, mask, 51, *[mask] * 12, 52]
    (state,) = decode(small.model, Request(prompt(small, 9), settings(), initial_ids=given))
    kept = [(slot, token) for slot, token in enumerate(given) if token != mask]
    assert [(slot, state.answer_ids()[slot]) for slot, _ in kept] == kept
    assert state.statistics.tokens == 13
    (full,) = decode(small.model, Request(prompt(small, 9), settings(), initial_ids=[50] * 16))
    assert full.done
    assert full.statistics.forward_passes == 0


def test_suffix_is_seen(small):
    plain, steered = decode(small.model, Request(prompt(small, 9), settings()),
                            Request(prompt(small, 9), settings(), suffix_ids=list(range(20, 60))))  # fmt: skip
    assert plain.answer_ids() != steered.answer_ids()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_length": 0}, "gen_length must be"),
        ({"gen_length": 16, "block_length": 5}, "block_length 5 does not divide gen_length 16"),
        ({"steps": 3}, "steps 3 is not a multiple"),
        ({"temperature": -1}, "temperature"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"threshold": 2}, "threshold"),
        ({"factor": 0}, "factor"),
        ({"threshold": 0.9, "factor": 1}, "exclude each other"),
        ({"threshold": 0.9, "remasking": "random"}, "low_confidence"),
        ({"remasking": "best"}, "remasking"),
        ({"stop": [""]}, "stop string"),
        ({"pace": 3}, "unknown generation setting pace"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_bad_requests(small):
    with pytest.raises(InputError, match="3 initial ids"):
        decode(small.model, Request(prompt(small, 9), settings(), initial_ids=[1, 2, 3]))
    with pytest.raises(InputError, match="more than the model's 32768"):
        decode(small.model, Request(prompt(small, 32767), settings()))
