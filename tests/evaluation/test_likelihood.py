"""The Monte Carlo bound against a naive loop and against the exact expectation."""

import itertools
import math

import pytest
import torch

from vidlada.errors import InputError
from vidlada.evaluation.likelihood import is_greedy, masked_counts, negative_log_likelihood


@pytest.fixture(scope="module")
def prompt(small):
    return small.chat(None).request("is it red ?").prompt


def hidden_loss(small, prompt, ids, hidden):
    """Sum of -log p of the hidden tokens, one forward pass, token by token."""
    model = small.model
    seen = [model.config.mask_token_id if n in hidden else token for n, token in enumerate(ids)]
    with torch.inference_mode():
        embedded = model.language_model.embed_tokens(torch.tensor(seen))
        states = model.language_model(torch.cat((prompt, embedded))[None])[0]
        total = 0.0
        for place in hidden:
            probabilities = model.lm_head(states[len(prompt) + place]).double().softmax(-1)
            total -= math.log(float(probabilities[ids[place]]))
    return total


def test_against_a_naive_loop(small, prompt):
    ids, samples = small.processor.text_ids("red circle turns blue"), 7
    found = negative_log_likelihood(small.model, prompt, ids, samples, batch_size=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    counts = masked_counts(len(ids), samples, generator)
    draws = torch.rand(samples, len(ids), generator=generator)
    total = 0.0
    for count, draw in zip(counts, draws, strict=True):
        hidden = set(draw.argsort()[:count].tolist())
        total += len(ids) / count * hidden_loss(small, prompt, ids, hidden)
    assert found == pytest.approx(total / samples, rel=1e-5)


def test_its_expectation_is_the_bound(small, prompt):
    ids = small.processor.text_ids("red circle turns")
    exact = 0.0
    for count in range(1, len(ids) + 1):
        subsets = list(itertools.combinations(range(len(ids)), count))
        exact += sum(hidden_loss(small, prompt, ids, set(s)) for s in subsets) / len(subsets) / count
    found = negative_log_likelihood(small.model, prompt, ids, samples=1500, batch_size=500)
    assert found == pytest.approx(exact, rel=0.03)


def test_one_token_is_exact(small, prompt):
    ids = small.processor.text_ids("red")
    found = negative_log_likelihood(small.model, prompt, ids, samples=2)
    assert found == pytest.approx(hidden_loss(small, prompt, ids, {0}), rel=1e-5)


def test_counts_spread_evenly():
    for length, samples in ((5, 5), (8, 16), (3, 7)):
        counts = masked_counts(length, samples, torch.Generator().manual_seed(length))
        assert all(1 <= count <= length for count in counts)
        each = [counts.count(n) for n in range(1, length + 1)]
        assert max(each) - min(each) <= 1


def test_seed_decides(small, prompt):
    ids = small.processor.text_ids("red circle turns blue")
    one, same, other = (negative_log_likelihood(small.model, prompt, ids, 3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_greedy(small, prompt):
    answer = small.ask(None, "is it red ?", gen_length=3, block_length=3)
    wrong = [token if n else (token + 1) % 200 + 8 for n, token in enumerate(answer.token_ids)]
    if answer.finish_reason == "length":
        assert is_greedy(small.model, prompt, answer.token_ids)
    assert not is_greedy(small.model, prompt, wrong)


def test_refusals(small, prompt):
    with pytest.raises(InputError, match="empty"):
        negative_log_likelihood(small.model, prompt, [])
    with pytest.raises(InputError, match="more than the model"):
        negative_log_likelihood(small.model, prompt, [9] * small.model.config.max_length)
