"""The objective against the published code's numbers, against loops, and its masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from vectors import VARIANTS, arrays, expand_video, load_reference_model, pixels

from vidlada.model.masks import SharedPrefixMask
from vidlada.training.objective import (
    IGNORED,
    MINIMUM_PROBABILITY,
    Masking,
    conversation_mask,
    diffusion_loss,
    draw_masking,
    draw_times,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_loss(variant):
    recorded = arrays(variant)
    model = load_reference_model(variant)
    labels = torch.from_numpy(recorded["loss.spliced_labels"])
    sample_index = torch.zeros_like(labels)
    probability = (1 - MINIMUM_PROBABILITY) * torch.from_numpy(recorded["loss.t"]) + MINIMUM_PROBABILITY
    masked = (torch.from_numpy(recorded["loss.uniform"]) < probability) & (labels != IGNORED)
    masking = Masking(masked, probability)
    turns = torch.from_numpy(recorded["loss.turn_ids"])
    by_turn = conversation_mask(turns, torch.ones_like(turns, dtype=torch.bool))
    with torch.no_grad():
        (visual,) = model.encode_media(pixels(104, 2), [2])
        ids = expand_video(recorded["loss.ids"], len(visual))
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        embeddings = model.embed(ids.masked_fill(masked, model.config.mask_token_id), visual)
        for name, attention_mask in (("loss.value", None), ("loss.value_turn_mask", by_turn)):
            output = model(inputs_embeds=embeddings, attention_mask=attention_mask, logits_to_keep=masked)
            loss = diffusion_loss(output.logits, labels, sample_index, masking)
            assert float(loss) == pytest.approx(float(recorded[name]), abs=5e-5), name


def test_loss_against_loops():
    samples = [[0, 0, 0, 1, 1, -2, -2, -2], [2, 2, 2, 2, 2, 3, 3, 3]]
    labels = torch.tensor([[IGNORED, 4, 1, 3, 2] + [IGNORED] * 3, [0, 0, 1, IGNORED, 6, 5, IGNORED, IGNORED]])
    sample_index = torch.tensor(samples)
    masked = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 0, 0]]).bool()
    probability = torch.tensor([0.5, 0.9, 0.2, 0.3])
    all_logits = torch.randn(2, 8, 7, generator=seeded())
    total = 0.0
    for sample in range(4):
        places = [(row, i) for row in range(2) for i in range(8) if samples[row][i] == sample]
        targets = [place for place in places if labels[place] != IGNORED]
        for place in targets:
            if masked[place]:
                cross_entropy = float(all_logits[place].exp().sum().log() - all_logits[place][labels[place]])
                total += cross_entropy / float(probability[sample]) / len(targets) / 4
    loss = diffusion_loss(all_logits[masked], labels, sample_index, Masking(masked, probability))
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_nothing_hidden_is_no_loss():
    logits = torch.zeros(0, 7, requires_grad=True)
    nothing = Masking(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0.1]))
    loss = diffusion_loss(logits, torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, dtype=torch.long), nothing)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("stratified", [True, False])
def test_masked_share_follows_the_probability(stratified):
    sample_index = torch.arange(8).repeat_interleave(4000).reshape(2, -1)
    targets = torch.rand(sample_index.shape, generator=seeded(1)) < 0.7
    force = torch.arange(8) == 5
    times = draw_times(8, seeded(3), stratified)
    masking = draw_masking(targets, sample_index, times, seeded(2), force)
    assert not masking.masked[~targets].any()
    assert masking.masked[targets & (sample_index == 5)].all()
    for sample, probability in enumerate(masking.probability):
        own = masking.masked[targets & (sample_index == sample)].float().mean()
        assert float(own) == pytest.approx(float(probability), abs=0.04)


@given(samples=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_stratified_times_take_one_value_of_each_stratum(samples, seed):
    times = draw_times(samples, seeded(seed))
    sample_index = torch.arange(samples)[None]
    masking = draw_masking(torch.ones(1, samples, dtype=torch.bool), sample_index, times, seeded(seed))
    lowest = torch.arange(samples) / samples
    found = times.sort().values
    assert (found > lowest - 1e-5).all()
    assert (found < lowest + 1 / samples + 1e-5).all()
    assert MINIMUM_PROBABILITY <= masking.probability.min() <= masking.probability.max() <= 1


def test_draws_depend_on_the_generator_alone():
    sample_index = torch.arange(4).repeat_interleave(50)[None]
    targets = torch.ones_like(sample_index, dtype=torch.bool)
    first, again, other = (
        draw_masking(targets, sample_index, draw_times(4, seeded(seed)), seeded(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.probability, again.probability)
    assert not torch.equal(first.masked, other.masked)


def test_a_shared_prefix_against_all_pairs():
    sizes, generator = (3, 4, 2), torch.Generator().manual_seed(0)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    mask = SharedPrefixMask(sizes, valid)
    part = [number for number, size in enumerate(sizes) for _ in range(size)]
    dense = mask.dense()
    for row in range(2):
        for query in range(9):
            expected = [bool(valid[row, key]) and part[key] in (0, part[query]) for key in range(9)]
            assert dense[row, 0, query].tolist() == expected
    queries, keys, values = (torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.double) for _ in range(3))
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=dense)
    mixed = mask.attend(queries, keys, values)
    assert mixed.isfinite().all()
    seen = valid[:, None, :, None].expand_as(mixed)
    torch.testing.assert_close(mixed[seen], expected[seen])


def test_a_sample_counts_as_often_as_its_weight():
    labels, sample_index = torch.tensor([[3, 1, 2, -100]]), torch.tensor([[0, 1, 1, 1]])
    masking = Masking(torch.tensor([[True, True, False, False]]), torch.tensor([1.0, 0.5]))
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    first, second = F.cross_entropy(logits, torch.tensor([3, 1]), reduction="none").tolist()
    loss = diffusion_loss(logits, labels, sample_index, masking, sample_weight=torch.tensor([1.0, 3.0]))
    assert float(loss) == pytest.approx((first + 3 * second / 0.5 / 2) / 2)


def test_conversation_mask_against_loops():
    turns = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 0, 0]])
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    mask = conversation_mask(torch.from_numpy(turns), torch.from_numpy(valid))
    assert mask.shape == (2, 1, 5, 5)
    for row in range(2):
        for query in range(5):
            expected = [bool(valid[row, key]) and turns[row, key] <= turns[row, query] for key in range(5)]
            assert mask[row, 0, query].tolist() == expected
