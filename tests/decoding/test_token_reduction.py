"""Visual tokens merged over time and space."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vidlada.decoding.token_reduction import merge_tokens, reduce_visual
from vidlada.generation import GenerationSettings
from vidlada.info import memory_need
from vidlada.processor import EncodedConversation


def conversation(*videos):
    """Text, and videos given as sizes of their frames, with text between them."""
    encoded, first = EncodedConversation(), 0
    for sizes in videos:
        encoded.append([7, 8], 0)
        encoded.append_medium(-200, [first + n for n, size in enumerate(sizes) for _ in range(size)], 0)
        first += len(sizes)
    encoded.append([9], 0, control=True)
    return encoded


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0.01, 1), st.integers(0, 99))
@hypothesis_settings(max_examples=50)
def test_the_share_is_kept_and_the_sum_of_all_is_left(sizes, keep, seed):
    frames = [number for number, size in enumerate(sizes) for _ in range(size)]
    tokens = torch.randn(len(frames), 8, generator=torch.Generator().manual_seed(seed))
    merged, kept = merge_tokens(tokens, frames, keep)
    assert len(merged) == len(kept) == max(1, round(keep * len(frames)))
    assert kept.tolist() == sorted(set(kept.tolist())) and kept[0] == 0
    assert merged.abs().max() <= tokens.abs().max() + 1e-6  # means


def test_nothing_is_lost_where_frames_repeat():
    """Three equal frames of three different tokens: a third of the tokens are just these."""
    frame = torch.eye(3)
    merged, kept = merge_tokens(frame.repeat(3, 1), [0, 0, 0, 1, 1, 1, 2, 2, 2], 1 / 3)
    assert kept.tolist() == [0, 1, 2]
    torch.testing.assert_close(merged, frame)


def test_alike_tokens_of_one_frame_become_their_mean():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2], [-1.0, 0.0]])
    merged, kept = merge_tokens(tokens, [0] * 4, 0.75)
    assert kept.tolist() == [0, 1, 3]
    torch.testing.assert_close(merged[0], torch.tensor([1.0, 0.1]))


def test_everything_else_keeps_its_place():
    encoded = conversation([4, 4], [4])
    visual = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    fewer, tokens = reduce_visual(encoded, visual, 0.5)
    frames = [frame for frame in fewer.frame_index if frame >= 0]
    assert len(tokens) == len(frames) == 6 and frames == sorted(frames)
    assert frames.count(2) == 2  # each video keeps its share
    assert [token for token in fewer.input_ids if token >= 0] == [7, 8, 7, 8, 9]
    assert fewer.is_control[-1] and len({len(part) for part in vars(fewer).values() if isinstance(part, list)}) == 1
    same, all_tokens = reduce_visual(encoded, visual, 1.0)
    assert same == encoded and torch.equal(all_tokens, visual)


def test_without_a_video_nothing_happens():
    encoded = conversation()
    fewer, tokens = reduce_visual(encoded, torch.empty(0, 8), 0.5)
    assert fewer == encoded and not len(tokens)


@pytest.mark.parametrize("cache", ["none", "mars:window=1", "dual"])
def test_answers_about_fewer_tokens(small, cache):
    import numpy as np

    video = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    options = {"gen_length": 8, "cache": cache}
    whole, half = (small.ask(video, "what ?", visual_keep=keep, **options) for keep in (1.0, 0.5))
    visual = 4 * small.processor.tokens_per_frame + small.processor.closing_tokens
    missing = whole.statistics.layer_tokens[0] - half.statistics.layer_tokens[0]
    assert missing >= visual - max(1, round(visual * 0.5))
    assert whole.frame_times == half.frame_times


def test_memory_estimates_count_it(small):
    settings = GenerationSettings(gen_length=32, cache="dual")
    whole, half = (memory_need(small.model.config, 0, 8, settings.replace(visual_keep=keep), 4) for keep in (1.0, 0.5))
    assert half.tokens < whole.tokens and half.cache < whole.cache
