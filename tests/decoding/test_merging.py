"""Visual tokens merged over time and space."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from media import write_video

from vidlada.cli import main
from vidlada.decoding.merging import merge_tokens, merge_visual
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.info import memory_need
from vidlada.processor import EncodedConversation
from vidlada.tiling import ImageShape

VIDEO = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
STATIC = np.full((16, 16, 16, 3), 90, dtype=np.uint8)
NEWLINE = torch.full((8,), 3.0)


def no_newlines(tokens):
    return np.zeros(len(tokens), dtype=bool)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conversation(*videos, between=(7, 8)):
    """Text, and videos given as numbers of frames of 4 cells and 2 newlines."""
    encoded, first = EncodedConversation(), 0
    for frames in videos:
        encoded.append(between, 0)
        encoded.append_medium(-200, [first + n for n in range(frames) for _ in range(6)], 0, frames)
        first += frames
    encoded.append([9], 0, control=True)
    return encoded


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.floats(0.01, 1), st.integers(0, 99))
@hypothesis_settings(max_examples=50)
def test_the_share_is_kept_and_rows_with_cells_keep_their_newline(frames, rows, columns, keep, seed):
    tokens = seeded(frames * rows, columns + 1, 8, seed=seed)
    tokens[:, -1] = NEWLINE
    row = np.arange(frames * rows).repeat(columns + 1)
    newlines = np.array(([False] * columns + [True]) * (frames * rows))
    merged, kept = merge_tokens(tokens.flatten(0, 1), newlines, frames, keep)
    count = max(1, round(keep * len(newlines)))
    assert len(merged) == len(kept) == count
    assert kept.tolist() == sorted(set(kept.tolist())) and kept[0] == 0
    assert torch.equal(merged[newlines[kept]], NEWLINE.expand(newlines[kept].sum(), -1))
    without_newline = set(row[kept]) - set(row[kept[newlines[kept]]])
    assert count == 1 or not without_newline
    without_cells = set(row[kept]) - set(row[kept[~newlines[kept]]])
    assert len(without_cells) <= 1  # a single token is left over
    assert merged.abs().max() <= tokens.abs().max() + 1e-6  # means


def test_newlines_are_not_what_is_merged():
    """All newlines are equal, more alike than any cells; a tenth of the tokens goes, and no newline."""
    tokens = seeded(13 * 3, 4, 8)
    tokens[:, -1] = NEWLINE
    newlines = np.array(([False] * 3 + [True]) * 13 * 3)
    _, kept = merge_tokens(tokens.flatten(0, 1), newlines, 13, 0.9)
    assert newlines[kept].sum() == newlines.sum() and len(kept) == round(0.9 * 156)


def test_nothing_is_lost_where_frames_repeat():
    """Three equal frames of three different tokens: a third of the tokens are just these."""
    frame = torch.eye(3)
    merged, kept = merge_tokens(frame.repeat(3, 1), no_newlines(range(9)), 3, 1 / 3)
    assert kept.tolist() == [0, 1, 2]
    torch.testing.assert_close(merged, frame)


def test_alike_tokens_of_one_frame_become_their_mean():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2], [-1.0, 0.0]])
    merged, kept = merge_tokens(tokens, no_newlines(tokens), 1, 0.75)
    assert kept.tolist() == [0, 1, 3]
    torch.testing.assert_close(merged[0], torch.tensor([1.0, 0.1]))


def test_a_chain_of_alike_tokens_becomes_one():
    """Of every frame the one before is the most alike, over forty frames."""
    angle = torch.linspace(0, 1, 40)
    tokens = torch.stack((angle.cos(), angle.sin()), dim=1)
    merged, kept = merge_tokens(tokens, no_newlines(tokens), 40, 1 / 40)
    assert kept.tolist() == [0]
    torch.testing.assert_close(merged[0], tokens.mean(0))


def test_everything_else_keeps_its_place(small):
    encoded, config = conversation(2, 1), small.model.config
    visual = seeded(18, 8)
    fewer, tokens = merge_visual(encoded, visual, 0.5, config)
    frames = [frame for frame in fewer.frame_index if frame >= 0]
    assert len(tokens) == len(frames) == 9 and frames == sorted(frames)
    assert frames.count(2) == 3  # each video keeps its share
    assert [token for token in fewer.input_ids if token >= 0] == [7, 8, 7, 8, 9]
    per_position = [part for name, part in vars(fewer).items() if name != "media"]
    assert fewer.is_control[-1] and len({len(part) for part in per_position}) == 1
    same, all_tokens = merge_visual(encoded, visual, 1.0, config)
    assert same == encoded and torch.equal(all_tokens, visual)


def test_media_side_by_side_are_merged_each_by_itself(small):
    """The second begins as the first ends: were they one video, that would be merged."""
    config = small.model.config
    first = seeded(12, 8)
    second = torch.cat((first[6:], seeded(12, 8, seed=1)))
    _, tokens = merge_visual(conversation(2, 3, between=()), torch.cat((first, second)), 0.5, config)
    newlines = [np.array(config.newlines(frames)) for frames in (2, 3)]
    alone = [merge_tokens(first, newlines[0], 2, 0.5)[0], merge_tokens(second, newlines[1], 3, 0.5)[0]]
    torch.testing.assert_close(tokens, torch.cat(alone))


def test_the_processor_notes_every_medium(small):
    shapes = [2, ImageShape(30, 40)]
    parts = [{"type": "video", "inline": True}, {"type": "image", "inline": True}, {"type": "text", "text": " what ?"}]
    encoded = small.processor.encode([{"role": "user", "content": parts}], shapes)
    assert encoded.media == shapes


def test_without_a_video_nothing_happens(small):
    encoded = conversation()
    fewer, tokens = merge_visual(encoded, torch.empty(0, 8), 0.5, small.model.config)
    assert fewer == encoded and not len(tokens)


@pytest.mark.parametrize("cache", ["none", "mars:window=1", "dual"])
def test_answers_about_fewer_tokens(small, cache):
    options = {"gen_length": 8, "cache": cache}
    whole, half = (small.ask(VIDEO, "what ?", visual_keep=keep, **options) for keep in (1.0, 0.5))
    assert whole.statistics.layer_tokens[0] - half.statistics.layer_tokens[0] >= 12
    assert whole.frame_times == half.frame_times
    assert (whole.statistics.visual_tokens, whole.statistics.merged) == (24, 0)
    assert (half.statistics.visual_tokens, half.statistics.merged) == (12, 12)


@pytest.mark.parametrize("cache", ["mars:window=8", "mars:window=15", "mars:window=1,anchors=64"])
def test_a_cache_is_judged_by_the_video_as_it_was_given(small, cache):
    """Few of 16 equal frames, and few of their 96 tokens, are left; whether the settings fit must not depend on it."""
    answer = small.ask(STATIC, "what ?", gen_length=8, cache=cache, visual_keep=0.1)
    assert answer.statistics.visual_tokens == 10
    for wrong, message in (("mars:window=16", "the video of 16 frames"), ("mars:window=1,anchors=97", "the 96 visual")):
        with pytest.raises(InputError, match=message):
            small.ask(STATIC, "what ?", gen_length=8, cache=wrong, visual_keep=0.1)


def test_statistics_of_a_thought_and_its_answer(small):
    options = {"gen_length": 8, "think": True, "think_length": 8, "visual_keep": 0.5}
    found = small.ask(VIDEO, "what ?", cache="dual", visual_prune="redvtp:keep=0.5", **options).statistics
    assert (found.visual_tokens, found.merged, found.pruned) == (12, 12, 6)
    chosen = small.ask(VIDEO, "what ?", choices=["red", "blue"], visual_keep=0.5).statistics
    assert (chosen.visual_tokens, chosen.merged) == (12, 12)


def test_the_command_line_and_batches_count_what_the_model_saw(small_folder, tmp_path):
    clip, out = str(write_video(tmp_path / "clip.mp4", frames=50)), tmp_path / "out.jsonl"  # two frames
    options = ["--model", str(small_folder), "--gen-length", "8", "--visual-keep", "0.5"]
    done = CliRunner().invoke(main, ["ask", clip, "is it red ?", "--json", *options])
    assert done.exit_code == 0, done.output
    statistics = json.loads(done.stdout)["statistics"]
    assert (statistics["visual_tokens"], statistics["merged"], statistics["pruned"]) == (6, 6, 0)
    questions = tmp_path / "questions.jsonl"
    lines = [{"video": clip, "question": "is it red ?", "visual_keep": keep} for keep in (0.5, 1.0)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert CliRunner().invoke(main, ["batch", str(questions), "--out", str(out), *options]).exit_code == 0
    half, whole = (json.loads(line) for line in out.read_text().splitlines())
    assert half["statistics"]["merged"] == whole["prompt_tokens"] - half["prompt_tokens"] == 6


def test_memory_estimates_count_it(small):
    settings = GenerationSettings(gen_length=32, cache="dual")
    whole, half = (memory_need(small.model.config, 0, 8, settings.replace(visual_keep=keep), 4) for keep in (1.0, 0.5))
    assert half.tokens < whole.tokens and half.cache < whole.cache
