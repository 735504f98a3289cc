"""Which tokens become final: properties of every rule, and naive oracles of each."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from random_requests import decode, random_request
from vectors import arrays, load_reference_model

from vidlada.decoding.choices import check_choices
from vidlada.decoding.commit import (
    RULES,
    Credit,
    EntropyBound,
    Factor,
    HistoryStable,
    Prophet,
    Proposals,
    Threshold,
    TopK,
    Wino,
    commit_rule,
    compute_measure,
    most_confident,
    spread,
    within_nucleus,
)
from vidlada.decoding.sampler import Denoiser, denoise
from vidlada.decoding.streaming import stable_text
from vidlada.decoding.verify import verify
from vidlada.errors import InputError
from vidlada.generation import MAX_SLOTS, GenerationSettings
from vidlada.settings import settings_of

BLOCKS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
# Every rule, bold enough to matter on the random weights of the small model.
BOLD = [
    "topk:tokens=3", "threshold:confidence=0.02", "factor:factor=4.5", "credit:confidence=0.05,strength=5",
    "prophet:early=0.6,middle=0.4,late=0.2", "entropy:bound=8", "stable:steps=2,confidence=0.01",
    "wino:draft=0.02,verify=0.025",
]  # fmt: skip


def tensors(block):
    confidence, is_open = zip(*block, strict=True)
    assume(any(is_open))
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(is_open)


def proposals(block, tokens=None, measured=None):
    confidence, is_open = tensors(block)
    tokens = torch.arange(len(block)) if tokens is None else torch.tensor(tokens)
    return Proposals(tokens, confidence, is_open, measured)


def make_request(model, seed=0, tokens=20, **changes):
    return random_request(model, [-1] * 4 + [0] * 6 + [1] * 6 + [-1] * (tokens - 16), seed, **changes)


def test_recorded_schedules():
    for row, (masks, steps) in zip(arrays("mha")["schedule"], [(32, 32), (32, 12), (32, 5), (8, 3), (7, 4)],
                                   strict=True):  # fmt: skip
        assert [spread(masks, steps, step) for step in range(steps)] == row[:steps].tolist()


@given(st.integers(0, 200), st.integers(1, 200))
def test_spread_is_even_and_complete(masked, steps):
    plan = [spread(masked, steps, step) for step in range(steps)]
    assert sum(plan) == masked
    assert plan == sorted(plan, reverse=True)
    assert max(plan) - min(plan) <= 1


def test_steps_without_end_cost_nothing():
    rule = TopK()
    rule.begin_block(32, 10**18)
    confidence = torch.rand(32).double()
    assert rule.choose(Proposals(torch.arange(32), confidence, torch.ones(32, dtype=torch.bool))).sum() == 1


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
    chosen = Threshold(threshold).choose(proposals(block))
    expected = {i for i, (value, is_open) in enumerate(block) if is_open and value > threshold}
    found = set(np.flatnonzero(chosen.numpy()).tolist())
    assert found == expected if expected else len(found) == 1 and all(block[i][1] for i in found)


@given(BLOCKS, st.floats(0.01, 4))
def test_factor(block, factor):
    chosen = Factor(factor).choose(proposals(block))
    ranked = sorted((value for value, is_open in block if is_open), reverse=True)
    largest = 1
    for n in range(1, len(ranked) + 1):
        if (n + 1) * (1 - ranked[n - 1]) < factor:
            largest = n
    assert int(chosen.sum()) == largest
    assert not (chosen & ~torch.tensor([is_open for _, is_open in block])).any()


@given(BLOCKS, st.floats(0, 5))
def test_entropy_bound(block, bound):
    # multiples of 1/64, whose sums are exact
    block, bound = [(round(value * 64) / 64, is_open) for value, is_open in block], round(bound * 64) / 64
    entropies = torch.tensor([value for value, _ in block], dtype=torch.float64)
    chosen = EntropyBound(bound).choose(proposals(block, measured=entropies))
    largest, total = 0, 0.0
    for n, entropy in enumerate(sorted(value for value, is_open in block if is_open), start=1):
        total += entropy
        if total - entropy <= bound:
            largest = n
    assert int(chosen.sum()) == max(1, largest)
    assert entropies[chosen].max() <= min(
        [value for (value, is_open), taken in zip(block, chosen.tolist(), strict=True) if is_open and not taken],
        default=math.inf,
    )


@given(BLOCKS, st.integers(0, 40), st.floats(0, 10))
def test_prophet_commits_all_or_follows_the_schedule(block, step, gap):
    rule = Prophet()
    rule.begin_block(len(block), 40)
    rule.step = step
    found = proposals(block, measured=torch.full((len(block),), gap, dtype=torch.float64))
    third = min(2, 3 * step // min(40, len(block)))
    everything = gap >= (7.5, 5.0, 2.5)[third]
    assert rule.choose(found).sum() == (found.open.sum() if everything else 1)


def test_prophet_s_progress_is_that_of_its_own_steps():
    """Four tokens a step fill 32 slots in eight steps, whose last third begins with the seventh."""
    rule = Prophet(tokens=4, early=9e5, middle=9e5, late=0)
    rule.begin_block(32, 32)
    figures, is_open, taken = torch.ones(32, dtype=torch.float64), torch.ones(32, dtype=torch.bool), []
    for _ in range(7):
        chosen = rule.choose(Proposals(torch.arange(32), figures, is_open, figures))
        is_open = is_open & ~chosen
        taken.append(int(chosen.sum()))
    assert taken == [4] * 6 + [8]


@pytest.mark.parametrize("commit", ["topk:tokens=2", "prophet:tokens=2"])
def test_a_pace_in_tokens_and_one_in_steps_exclude_each_other(commit):
    settings = GenerationSettings(gen_length=8, block_length=8, steps=2, commit=commit)
    with pytest.raises(InputError, match=f"commit {commit} and steps 2 both set the pace"):
        commit_rule(settings)


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=8), st.integers(1, 4))
def test_history_stable_against_a_naive_history(history, steps):
    rule = HistoryStable(steps=steps, confidence=0.0)
    rule.begin_block(4, 4)
    for now in range(len(history)):
        block = [(0.5 - 0.1 * slot, True) for slot in range(4)]
        chosen = rule.choose(proposals(block, history[now]))
        past = history[max(0, now - steps + 1) : now + 1]
        stable = [len(past) == steps and len({row[slot] for row in past}) == 1 for slot in range(4)]
        assert chosen.tolist() == (stable if any(stable) else [True, False, False, False])


def test_credit_against_the_formula():
    rule, logits = Credit(decay=0.5, power=0.5, strength=2.0), torch.randn(3, 2, 5)
    rule.begin_block(2, 2)
    credit = np.zeros((2, 5))
    for step in logits:
        probability = step.double().softmax(-1).numpy()
        credit *= 0.5
        for slot in range(2):
            best = probability[slot].argmax()
            credit[slot, best] += probability[slot, best] ** 0.5
        expected = step.double().numpy() + 2 * np.log1p(credit)
        np.testing.assert_allclose(rule.adjust(step).numpy(), expected, rtol=1e-5, atol=1e-6)


@given(BLOCKS, st.floats(0, 1), st.integers(0, 40))
def test_wino_takes_back_fewer_than_it_committed(block, bound, committed):
    rule = Wino(verify=bound)
    rule.committed = committed
    values, is_drafted = zip(*block, strict=True)
    probability, drafted = torch.tensor(values, dtype=torch.float64), torch.tensor(is_drafted)
    revoked = rule.revoke(probability, drafted)
    assert not (revoked & ~drafted).any()
    assert (probability[revoked] < bound).all()
    assert int(revoked.sum()) <= max(0, committed - 1)


def test_figures_of_distributions():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [3.0, 1.0, 0.0]])
    torch.testing.assert_close(compute_measure("entropy", logits)[0], torch.tensor(math.log(2), dtype=torch.float64))
    assert compute_measure("gap", logits).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("commit", BOLD)
@pytest.mark.parametrize("cache", ["none", "dual", "mars:text=2,group=1"])
def test_every_rule_fills_the_answer_and_changes_nothing_final(small, commit, cache):
    before = None
    for _, state in denoise(small.model, [make_request(small.model, commit=commit, cache=cache)]):
        if before is not None:
            assert (state.committed | ~before.committed).all()
            assert (state.proposed[before.committed] == before.proposed[before.committed]).all()
        before = state
    assert before.done and before.committed.all()
    assert before.statistics.tokens == 16
    assert before.statistics.steps <= 16


def test_bold_rules_take_fewer_steps(small):
    for commit in BOLD:
        (state,) = decode(small.model, make_request(small.model, commit=commit))
        assert state.statistics.steps < 16, commit


def test_a_rule_gives_the_same_answer_in_a_batch_and_alone(small):
    requests = [make_request(small.model, seed, 18 + seed, commit=commit) for seed, commit in enumerate(BOLD)]
    requests += [replace(r, settings=r.settings.replace(cache="dual", commit=r.settings.commit)) for r in requests[::2]]
    for one, together in zip(requests, decode(small.model, *requests), strict=True):
        (alone,) = decode(small.model, one)
        assert together.answer_ids() == alone.answer_ids()
        assert together.statistics.steps == alone.statistics.steps


@pytest.mark.parametrize(
    ("commit", "old"),
    [("topk", {}), ("threshold:confidence=0.05", {"threshold": 0.05}), ("factor:factor=4.5", {"factor": 4.5})],
)
def test_the_old_settings_are_rules(small, commit, old):
    (named,), (plain,) = (decode(small.model, make_request(small.model, **each)) for each in ({"commit": commit}, old))
    assert named.answer_ids() == plain.answer_ids()
    assert named.statistics.steps == plain.statistics.steps


@torch.inference_mode()
def test_tokens_are_verified_by_masks_beside_the_sequence():
    """Against one dense pass over the sequence with those masks behind it, under a mask of pairs."""
    model = load_reference_model("gqa")
    request = make_request(model, commit="wino:draft=1,verify=0", cache="full")
    denoiser = Denoiser(model)
    denoiser.add(request)
    for _ in range(3):  # the rule commits one a step, and takes none back
        denoiser.step()
    row = denoiser.rows[0]
    drafted = row.revocable.nonzero()[:, 0]
    assert len(drafted) == 3
    denoiser.block_logits([row])  # the next step's pass
    positions = row.caches[0].answer[drafted]
    suppressed = torch.tensor(model.config.suppressed_token_ids)
    found = verify(model, row.caches[0].kv_cache, positions, row.ids[drafted], suppressed)
    sequence, count = row.embeddings(model, guided=False), len(drafted)
    tokens = len(sequence)
    masks = model.language_model.embed_tokens(torch.full((count,), row.mask_id))
    pairs = torch.zeros(tokens + count, tokens + count, dtype=torch.bool)
    pairs[:, :tokens] = True
    pairs[tokens + torch.arange(count), positions] = False
    pairs[tokens:, tokens:] = torch.eye(count)
    position_ids = torch.cat((torch.arange(tokens), positions))[None]
    hidden = model.language_model(torch.cat((sequence, masks))[None], position_ids, pairs[None, None])[0, tokens:]
    logits = model.lm_head(hidden)
    logits[:, suppressed] = -torch.inf
    expected = logits.double().softmax(-1)[torch.arange(count), row.ids[drafted]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_what_may_be_taken_back_is_not_settled(small):
    """Tokens are taken back in the course, and settled text is a prefix of the answer at any time."""
    texts, taken_back, before = [], 0, None
    for seed in range(6):
        request = make_request(small.model, seed, commit="wino:draft=0.01,verify=0.99")
        states = [state for _, state in denoise(small.model, [request])]
        texts = [stable_text(state, lambda ids: " ".join(map(str, ids)), (), ()).text for state in states]
        assert all(texts[-1].startswith(text) for text in texts)
        filled = [state.statistics.tokens for state in states]
        for before, state in zip(states, states[1:], strict=False):
            assert (state.committed | ~before.committed).all()
        assert filled[-1] == 16 and all(a < b for a, b in zip(filled, filled[1:], strict=False))
        taken_back += any(
            bool(((a.confidence < 0.99) & (a.proposed != b.proposed) & ~a.committed).any())
            for a, b in zip(states, states[1:], strict=False)
        )
    assert taken_back


def test_a_stop_that_may_be_taken_back_is_not_told(small):
    free = decode(small.model, make_request(small.model, commit="wino:draft=0.01,verify=0.99"))[0].answer_ids()
    request = replace(make_request(small.model, commit="wino:draft=0.01,verify=0.99"), stop_sequences=[(free[5],)])
    stops = [state.stop_at for _, state in denoise(small.model, [request]) if state.stop_at is not None]
    assert len(set(stops)) == 1


def test_every_rule_is_tried_here():
    assert {text.partition(":")[0] for text in BOLD} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_settings_of_rules_have_bounds(name):
    for key, (_, listed, kind) in settings_of(RULES[name]).items():
        for value in ("nan", "inf", "1e39", "-1", str(10**18)):
            assert listed.maximum is not None and kind in (int, float)
            with pytest.raises(InputError, match=f"commit {name}: {key} must be"):
                commit_rule(GenerationSettings(commit=f"{name}:{key}={value}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": "lazy"}, "unknown commit 'lazy'; use topk"),
        ({"commit": "credit:speed=2"}, "no setting 'speed'; known: decay"),
        ({"commit": "entropy", "threshold": 0.9}, "threshold and commit exclude each other"),
        ({"commit": "entropy", "steps": 16}, "cannot be combined with commit entropy"),
        ({"commit": "wino", "remasking": "random"}, "needs remasking low_confidence"),
        ({"commit": "wino", "cfg_scale": 1.0}, "verifies without guidance"),
    ],
)
def test_bad_rules_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check_choices(GenerationSettings(gen_length=16, block_length=8, **changes))


@hypothesis_settings(max_examples=20)
@given(st.integers(1, MAX_SLOTS))
def test_any_number_of_steps_is_a_schedule(steps):
    rule = commit_rule(GenerationSettings(gen_length=8, block_length=8, steps=steps))
    rule.begin_block(8, steps)
    is_open, taken = torch.ones(8, dtype=torch.bool), 0
    while is_open.any():
        is_open = is_open & ~rule.choose(Proposals(torch.arange(8), torch.rand(8).double(), is_open))
        taken += 1
    assert taken == min(8, steps)


def test_the_nucleus_is_the_fewest_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.85, 0.03, 0.02]]).log()
    kept = [row.isfinite().tolist() for row in within_nucleus(logits, 0.7, 1.0)]
    assert kept == [[True, False, True, False], [False, True, False, False]]
    assert within_nucleus(logits, 1.0, 1.0).isfinite().all()
    assert within_nucleus(logits, 1e-9, 1.0).isfinite().sum(-1).tolist() == [1, 1]
    assert within_nucleus(logits, 0.7, 0.1).isfinite().sum(-1).tolist() == [1, 1]  # sharper: one is enough
