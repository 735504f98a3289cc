"""Chunk attention as one kernel: the same numbers as gathered blocks, on a CPU too."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import flex_attention
from vectors import load_reference_model

import vidlada.decoding.fused as fused_module
from vidlada.decoding.attention import FrameMap, chunked_attention
from vidlada.decoding.fused import BLOCK, FusedChunks, blocks_in_sight
from vidlada.decoding.sampler import Request, denoise
from vidlada.generation import GenerationSettings

pytestmark = pytest.mark.slow

sizes = st.lists(st.integers(1, 90), min_size=1, max_size=9)


def sequence(frames, before, after):
    index = [-1] * before + [number for number, size in enumerate(frames) for _ in range(size)] + [-1] * after
    return FrameMap.from_frame_index(torch.tensor(index))


def states(frames, seed, heads=4, key_value_heads=2, width=16):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, len(frames.visual), width, generator=generator)
    keys, values = torch.randn(2, key_value_heads, len(frames.frame_of), width, generator=generator)
    return queries, keys, values


def anchors_of(frames, count, per_head, seed):
    if not count:
        return None
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([frames.visual[torch.randperm(len(frames.visual), generator=generator)[:count]]] * 2)
    chosen[1] = frames.visual[torch.randperm(len(frames.visual), generator=generator)[:count]]
    return chosen if per_head else chosen[0]


@given(
    frames=sizes, before=st.integers(0, 5), after=st.integers(1, 200), window=st.integers(0, 3),
    anchors=st.integers(0, 20), per_head=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
@hypothesis_settings(max_examples=30)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equals_gathered_blocks(frames, before, after, window, anchors, per_head, seed):
    frames = sequence(frames, before, after)
    queries, keys, values = states(frames, seed)
    fused = FusedChunks(frames, window, len(queries), min(anchors, len(frames.visual)), flex_attention)
    for layer in range(2):  # each has anchors of its own
        chosen = anchors_of(frames, anchors, per_head, seed + layer)
        expected = chunked_attention(queries, keys, values, frames, window, chosen)
        found = fused(queries, keys, values, chosen)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(frames=sizes, before=st.integers(0, 300), after=st.integers(1, 300), window=st.integers(0, 3),
       anchors=st.integers(0, 200))  # fmt: skip
@hypothesis_settings(max_examples=50)
def test_blocks_cover_what_is_seen_and_no_more_than_they_must(frames, before, after, window, anchors):
    frames = sequence(frames, before, after)
    fused = FusedChunks(frames, window, 1, anchors)
    queries, keys = len(frames.visual), len(fused.is_copy)
    query, key = torch.meshgrid(torch.arange(queries), torch.arange(keys), indexing="ij")
    sees = fused.sees(torch.tensor(0), torch.tensor(0), query, key)
    partial, whole = blocks_in_sight(fused.first, fused.last, frames.frame_of, anchors)
    for row, column in ((row, column) for row in range(len(partial)) for column in range(partial.shape[1])):
        block = sees[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        assert not (partial[row, column] and whole[row, column])
        if whole[row, column]:
            assert block.all() and block.shape[1] == BLOCK
        copies = (column + 1) * BLOCK > len(frames.frame_of) and anchors
        if not partial[row, column] and not whole[row, column]:
            assert not block.any()
        elif not copies:  # which copies are in sight differs by layer
            assert block.any()


def test_work_grows_with_frames_and_not_with_their_square():
    marked = []
    for count in (32, 64):
        frames = sequence([196] * count, 20, 60)
        first = frames.frame_of[frames.visual]
        partial, whole = blocks_in_sight(first - 1, first + 1, frames.frame_of, 64)
        marked.append(int((partial | whole).sum()))
    assert marked[1] < 2.1 * marked[0]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
def test_compiled_equals_gathered_blocks():
    frames = sequence([49] * 9, 7, 40)
    queries, keys, values = states(frames, 0)
    chosen = anchors_of(frames, 16, True, 0)
    with torch.inference_mode():
        found = FusedChunks(frames, 1, len(queries), 16)(queries, keys, values, chosen)
    torch.testing.assert_close(found, chunked_attention(queries, keys, values, frames, 1, chosen), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_answers_are_the_same(small):
    frame_index = torch.tensor([-1] * 5 + [number for number in range(20) for _ in range(12)] + [-1] * 4)
    prompt = torch.randn(len(frame_index), small.model.config.text_config.hidden_size) * 0.2
    answers = []
    for fused in ("true", "false"):
        cache = f"mars:text=2,ratio=1,group=1,window=1,anchors=16,fused={fused}"
        settings = GenerationSettings(gen_length=16, block_length=8).replace(cache=cache)
        *_, (_, last) = denoise(small.model, [Request(prompt, settings, frame_index=frame_index.tolist())])
        answers.append(last)
    assert torch.equal(answers[0].proposed, answers[1].proposed)
    assert answers[0].statistics.refreshes["visual"] > 2


def test_too_many_shapes_fall_back_to_gathered_blocks(monkeypatch):
    """Beyond its limit of graphs PyTorch would build all scores."""
    model = load_reference_model("gqa")
    index = [-1] * 2 + [number for number in range(4) for _ in range(3)] + [-1] * 3
    prompt = torch.randn(len(index), model.config.text.hidden_size) * 0.2

    def answer(fused):
        cache = f"mars:window=1,text=1,ratio=1,anchors=3,fused={fused}"
        settings = GenerationSettings(gen_length=8, block_length=4, cache=cache)
        return [state.proposed.tolist() for _, state in denoise(model, [Request(prompt, settings, frame_index=index)])]

    def refuse(*args, **kwargs):
        raise FailOnRecompileLimitHit("too many")

    monkeypatch.setattr(fused_module, "compiled_flex_attention", lambda dynamic: refuse)
    assert answer("true") == answer("false")


def test_the_limit_of_graphs_is_its_own(monkeypatch):
    before = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda: torch._dynamo.config.recompile_limit)
    assert fused_module.compiled_flex_attention.__wrapped__(False)() == fused_module.MAX_GRAPHS != before
    assert torch._dynamo.config.recompile_limit == before
