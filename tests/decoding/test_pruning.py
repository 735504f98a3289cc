"""Visual tokens dropped after the first step (RedVTP): the same answers as if they were masked."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from media import write_video
from random_requests import decode, random_request
from vectors import load_reference_model

from vidlada.cli import main
from vidlada.decoding.cache import RequestCache
from vidlada.decoding.kv_cache import attend_grouped
from vidlada.decoding.memory import kept_bytes
from vidlada.decoding.policies.base import AttentionPattern
from vidlada.decoding.pruning import parse_pruning
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.rotary import rotary_angles

FRAMES = [-1, -1, *(frame for frame in range(4) for _ in range(5)), -1, -1, -1]
PRUNE = "redvtp:keep=0.4"
KEPT = 8  # of 20


def make_request(model, seed=0, **changes):
    return random_request(model, FRAMES, seed, **{"visual_prune": PRUNE, **changes})


def received(model, hidden, asking):
    """Attention that each position receives from some, over all layers and heads, written plainly."""
    config, total = model.config.text, torch.zeros(hidden.shape[1])
    rotation = rotary_angles(torch.arange(hidden.shape[1])[None], config.head_dim, config.rope_theta, hidden.dtype)
    for layer in model.language_model.layers:
        queries, keys, _ = layer.enter(hidden, rotation)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        weights = (queries @ keys.transpose(-1, -2) / config.head_dim**0.5).softmax(-1)  # (1, heads, tokens, tokens)
        total += weights[0, :, asking].sum((0, 1))
        hidden = layer(hidden, rotation, None)
    return total


@torch.inference_mode()
def naive(model, request):
    """One token a step, everything recomputed, dropped tokens masked."""
    settings, config = request.settings, model.config
    first, mask = len(request.prompt), config.mask_token_id
    ids = torch.full((settings.gen_length,), mask)
    visual = torch.tensor([place for place, frame in enumerate(FRAMES) if frame >= 0])
    seen = torch.ones(1, first + len(ids), dtype=torch.bool)
    embed = model.language_model.embed_tokens
    for step in range(settings.gen_length):
        block = slice(step // 8 * 8, step // 8 * 8 + 8)

        def logits(prompt, block=block, seen=seen):
            hidden = torch.cat((prompt, embed(ids)))[None]
            states = model.language_model(hidden, torch.arange(hidden.shape[1])[None], seen)
            return model.lm_head(states[0, first:][block]).float()

        found = logits(request.prompt)
        if settings.cfg_scale:
            without = logits(embed(torch.tensor([mask])).expand(first, -1))
            found = without + (settings.cfg_scale + 1) * (found - without)
        if step == 0:
            hidden = torch.cat((request.prompt, embed(ids)))[None]
            score = received(model, hidden, torch.arange(first, first + len(ids)))[visual]
            dropped = visual[score.argsort(descending=True)[KEPT:]]
            seen = seen.index_fill(1, dropped, False)
        found[:, config.suppressed_token_ids] = -torch.inf
        probability, tokens = found.double().softmax(-1).max(-1)
        best = int(probability.where(ids[block] == mask, torch.tensor(-1.0).double()).argmax())
        ids[block.start + best] = tokens[best]
    return ids.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache": "full"},
        {"cache": "mars:text=1,ratio=1,pyramid=1,group=1"},
        {"cfg_scale": 1.0},
        {"cache": "dual:every=1"},
    ],
)
def test_the_same_answer_as_with_dropped_tokens_masked(changes):
    for variant, seed in (("mha", 1), ("gqa", 2)):
        model = load_reference_model(variant)
        request = make_request(model, seed, **changes)
        (state,) = decode(model, request)
        assert state.proposed.tolist() == naive(model, request)
        assert state.statistics.pruned == 20 - KEPT


class MaskedPattern(AttentionPattern):
    """Full or chunk attention in which nobody sees what was dropped."""

    def __init__(self, inner, index, dropped):
        super().__init__()
        self.inner, self.dropped = inner, dropped
        frames = torch.as_tensor(index)
        numbers = {int(f): n for n, f in enumerate(sorted({int(f) for f in frames[(frames >= 0) & ~dropped]}))}
        frames = torch.tensor([numbers.get(int(f), -9) if f >= 0 else -1 for f in frames])
        window = getattr(inner, "window", 99)
        near = (frames[:, None] - frames[None]).abs() <= window
        self.chunks = near | (frames[:, None] < 0) | (frames[None] < 0)

    def begin_pass(self, plan, block):
        self.inner.begin_pass(plan, block)
        self.chunked, self.start = plan.chunked, plan.start.get("visual", 99)

    def __call__(self, queries, keys, values, layer, active):
        mask = (~self.dropped).expand(len(active), -1)
        if self.chunked and layer >= self.start:
            mask = mask & self.chunks[active]
            mask[self.dropped[active]] = True  # nobody looks at them; without any key they would be no numbers
        return attend_grouped(queries, keys, values, mask)


def mask_instead(cache, numbers):
    """In place of `RequestCache.prune`."""
    visual = (cache.index >= 0).nonzero()[0]
    dropped = torch.ones(len(visual), dtype=torch.bool)
    dropped[torch.from_numpy(numbers)] = False
    whole = torch.zeros(len(cache.index), dtype=torch.bool)
    whole[torch.from_numpy(visual)] = dropped
    cache.attention = MaskedPattern(cache.attention, cache.index, whole)


@pytest.mark.parametrize(
    "cache",
    ["frozen", "dual", "prefix:every=3", "dkv:every=4", "interval:prompt=5,response=3", "mars:text=2,ratio=2,group=1",
     "mars:text=2,ratio=1,group=1,window=1,anchors=0"],
)  # fmt: skip
def test_caches_are_what_they_are_over_masked_tokens(monkeypatch, cache):
    model = load_reference_model("gqa")
    requests = [make_request(model, seed, cache=cache) for seed in range(3)]
    dropped = decode(model, *requests)
    monkeypatch.setattr(RequestCache, "prune", mask_instead)
    masked = decode(model, *requests)
    for one, other in zip(dropped, masked, strict=True):
        assert one.proposed.tolist() == other.proposed.tolist()
        torch.testing.assert_close(one.confidence, other.confidence)


@pytest.mark.parametrize(
    "changes",
    [{"cache": "sparse"}, {"cache": "elastic"}, {"cache": "dllm"},
     {"cache": "mars:text=2,window=2,anchors=6,scene=0.1"},
     {"cache": "mars:drift=0.001"}, {"cache": "mars:window=1,anchors=9,per_head=true,text=1,ratio=1"},
     {"commit": "wino"}, {"cache": "dual", "threshold": 0.05}, {"cache": "mars", "temperature": 0.5}],
)  # fmt: skip
def test_alone_in_a_batch_and_on_fixed_buffers(changes):
    model = load_reference_model("gqa")
    requests = [
        make_request(model, 4, **changes),
        make_request(model, 5, cache="dual", visual_prune="redvtp:keep=0.05"),
    ]
    (alone,) = decode(model, requests[0])
    for found in (decode(model, *requests)[0], decode(model, *requests, static=True)[0]):
        assert found.proposed.tolist() == alone.proposed.tolist()
        assert found.statistics.layer_tokens == alone.statistics.layer_tokens
    assert alone.statistics.pruned == 20 - KEPT and decode(model, requests[1])[0].statistics.pruned == 19
    (everything,) = decode(model, replace(requests[0], settings=replace(requests[0].settings, visual_prune=None)))
    assert everything.statistics.pruned == 0


def test_keeping_all_changes_nothing_and_a_prompt_without_frames_has_nothing_to_drop():
    model = load_reference_model("mha")
    kept, whole = decode(
        model, make_request(model, visual_prune="redvtp:keep=1"), make_request(model, visual_prune="none")
    )
    assert kept.proposed.tolist() == whole.proposed.tolist() and kept.statistics.pruned == 0
    blind = replace(make_request(model), frame_index=None)
    assert decode(model, blind)[0].statistics.pruned == 0


def test_another_question_may_reuse_what_this_one_dropped():
    model = load_reference_model("gqa")
    request = make_request(model, cache="mars", reuse=1)
    (state,) = decode(model, request)
    assert state.visual.layers[0].shape[1] == 20
    (again,) = decode(model, replace(request, visual=state.visual))
    assert again.statistics.refreshes["visual"] == state.statistics.refreshes["visual"] - 1 or again.statistics.pruned


def test_memory_of_the_cache_that_it_needs_is_counted():
    config = load_reference_model("mha").config.text
    plain, pruned = (
        kept_bytes(config, 100, 50, GenerationSettings(visual_prune=value), 4) for value in (None, "redvtp")
    )
    assert plain == 0 and pruned == kept_bytes(config, 100, 50, GenerationSettings(cache="full"), 4)


def test_refused_by_name():
    for text, message in (("fast", "unknown visual_prune"), ("redvtp:keep=0", "keep"), ("redvtp:share=1", "share")):
        with pytest.raises(InputError, match=message):
            parse_pruning(text)


@pytest.mark.slow
def test_by_the_command_line(small_folder, tmp_path):
    clip = str(write_video(tmp_path / "clip.mp4", frames=50))
    command = ["ask", clip, "is it red ?", "--model", str(small_folder), "--json", "--cache", "mars", "--visual-prune"]
    done = CliRunner().invoke(main, [*command, "redvtp:keep=0.5"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    visual = 2 * 6  # frames of 4 cells and 2 line ends
    assert answer["statistics"]["pruned"] == visual // 2 and answer["settings"]["visual_prune"] == "redvtp:keep=0.5"
    refused = CliRunner().invoke(main, [*command, "most"], prog_name="vidlada")
    assert refused.exit_code == 2 and refused.stderr == "error: unknown visual_prune 'most'; use none, redvtp\n"
