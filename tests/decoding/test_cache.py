"""Caches: exact where they must be, and where they approximate, exactly the approximation they name."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from random_requests import decode, random_request
from vectors import VARIANTS, arrays, load_reference_model

from vidlada.decoding.attention import FrameMap, chunked_attention, find_anchors, scenes_of
from vidlada.decoding.kv_cache import KVCache, PartialPass, refresh
from vidlada.decoding.policies import POLICIES, parse_policy
from vidlada.decoding.policies.base import StepContext
from vidlada.decoding.policies.mars import Mars
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings, policy_text
from vidlada.model.rotary import rotary_angles

# Every policy as a way to recompute everything in every step.
EXACT = [
    "full", "dkv:every=1", "prefix:every=1", "dual:every=1", "interval:prompt=1",
    "mars:text=1,ratio=1,pyramid=1,window=-1", "mars:text=1,ratio=1,pyramid=1,window=-1,group=1",
]  # fmt: skip
APPROXIMATE = [
    "prefix",
    "dual",
    "frozen",
    "interval",
    "sparse",
    "dkv:every=3",
    "dllm:prompt=5,response=3",
    "elastic",
    "mars:text=2,window=1,anchors=4",
    "mars:text=2,group=1,window=1,anchors=4",
]


def layout(before, frames, after):
    """Frame index of a prompt; frames is a list of sizes."""
    index = [number for number, size in enumerate(frames) for _ in range(size)]
    return [-1] * before + index + [-1] * after


@pytest.mark.parametrize("cache", EXACT)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_answers(variant, cache):
    found = arrays(variant)
    prompt, frame_index = torch.from_numpy(found["splice.embeds"])[0], found["splice.frame_index"].reshape(-1).tolist()
    block_length, steps = {"mha": (32, 12), "gqa": (8, 32)}[variant]
    settings = GenerationSettings(gen_length=32, block_length=block_length, steps=steps, cache=cache)
    (state,) = decode(load_reference_model(variant), Request(prompt, settings, frame_index=frame_index))
    assert state.answer_ids() == found[f"generate.block{block_length}_steps{steps}"].reshape(-1).tolist()


@given(
    before=st.integers(1, 4), frames=st.lists(st.integers(1, 5), min_size=1, max_size=5), after=st.integers(0, 6),
    cache=st.sampled_from(EXACT), cfg=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
@hypothesis_settings(max_examples=30)
def test_recomputing_everything_changes_nothing(small, before, frames, after, cache, cfg):
    index = layout(before, frames, after)
    plain, cached = decode(
        small.model,
        random_request(small.model, index, cfg_scale=cfg),
        random_request(small.model, index, cfg_scale=cfg, cache=cache),
    )
    assert cached.answer_ids() == plain.answer_ids()
    assert cached.statistics.steps == plain.statistics.steps
    assert cached.statistics.layer_tokens == plain.statistics.layer_tokens


def test_a_cached_request_in_a_batch_gives_the_answer_it_gives_alone(small):
    prompts = [layout(2, [4] * (2 + number), 3 + number) for number in range(len(APPROXIMATE))]
    requests = [
        random_request(small.model, index, seed, cache=cache)
        for seed, (index, cache) in enumerate(zip(prompts, APPROXIMATE, strict=True))
    ]
    requests.insert(2, random_request(small.model, layout(1, [2], 1), 99))
    for one, state in zip(requests, decode(small.model, *requests), strict=True):
        (alone,) = decode(small.model, one)
        assert state.answer_ids() == alone.answer_ids()
        assert state.statistics.layer_tokens == alone.statistics.layer_tokens


def naive_pass(model, embeddings, memory, active):
    """One pass of the active positions by dense arithmetic; `memory` holds rotated keys and values of each layer."""
    config = model.config.text_config
    hidden = embeddings[active]
    rotation = rotary_angles(active[None], config.head_dim, config.rope_theta, hidden.dtype)
    for number, layer in enumerate(model.language_model.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)[None]
        queries, *fresh = (states[0] for states in attention.project(normed, rotation))
        keys, values = memory.setdefault(
            number, tuple(f.new_zeros(f.shape[0], len(embeddings), f.shape[2]) for f in fresh)
        )
        keys[:, active], values[:, active] = fresh
        groups = len(queries) // len(keys)
        scores = queries @ keys.repeat_interleave(groups, 0).transpose(1, 2) * config.head_dim**-0.5
        mixed = scores.softmax(-1) @ values.repeat_interleave(groups, 0)
        hidden = hidden + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.language_model.norm(hidden)


@torch.no_grad()
def test_a_partial_pass_reads_the_rest_from_the_store(small):
    model, tokens = small.model, 20
    embeddings = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    active = torch.tensor([3, 4, 11, 19])
    memory = {}
    naive_pass(model, embeddings[0], memory, torch.arange(tokens))
    changed = embeddings[0].clone()
    changed[active] = embeddings[1][active]
    expected = naive_pass(model, changed, memory, active)
    kv_cache = KVCache(model.config.text_config, embeddings[0])
    refresh(model.language_model, [PartialPass(kv_cache, {0: torch.arange(tokens)})])
    kv_cache.hidden[0][active] = embeddings[1][active]
    refresh(model.language_model, [PartialPass(kv_cache, {0: active})])
    top = model.config.text_config.num_hidden_layers
    torch.testing.assert_close(kv_cache.hidden[top][active], expected, atol=1e-5, rtol=1e-5)
    for layer in range(top):
        torch.testing.assert_close(kv_cache.keys[layer], memory[layer][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_group_that_joins_later_starts_from_its_stored_states(small):
    """Unchanged states below: joining at layer 1 must give what a pass from layer 0 gives."""
    model, everything = small.model, torch.arange(12)
    embeddings = torch.randn(12, 32, generator=torch.Generator().manual_seed(2)) * 0.3
    stores = [KVCache(model.config.text_config, embeddings, entries=[1]) for _ in range(2)]
    for kv_cache in stores:
        refresh(model.language_model, [PartialPass(kv_cache, {0: everything})])
        kv_cache.hidden[0][10:] = 0.5  # the answer changes
    refresh(model.language_model, [PartialPass(stores[0], {0: everything[10:], 1: everything[:10]})])
    memory = {0: (stores[1].keys[0].clone(), stores[1].values[0].clone())}
    refresh(model.language_model, [PartialPass(stores[1], {0: everything[10:]})])
    assert torch.equal(stores[0].keys[0][:, :10], memory[0][0][:, :10])  # layer 0 of the late group is untouched
    assert not torch.equal(stores[0].hidden[2][:10], stores[1].hidden[2][:10])
    assert stores[0].computed == [12 + 2, 12 + 12]


@pytest.mark.parametrize("per_head", [False, True])
@given(
    frames=st.lists(st.integers(1, 4), min_size=1, max_size=6), before=st.integers(0, 3), after=st.integers(1, 4),
    window=st.integers(0, 3), anchors=st.integers(0, 3), seed=st.integers(0, 100),
)  # fmt: skip
@hypothesis_settings(max_examples=40)
def test_chunked_attention_is_full_attention_under_a_mask(per_head, frames, before, after, window, anchors, seed):
    index = torch.tensor(layout(before, frames, after))
    frame_map = FrameMap.from_frame_index(index)
    visual = frame_map.visual
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(4, len(visual), 8, generator=generator)
    keys, values = torch.randn(2, 2, len(index), 8, generator=generator)
    chosen = None
    if anchors:
        chosen = visual[torch.stack([torch.randperm(len(visual), generator=generator)[:anchors] for _ in range(2)])]
        chosen = chosen if per_head else chosen[0]
    distance = (index[visual][:, None] - index[None]).abs()
    mask = ((distance <= window) | (index == -1)).expand(2, -1, -1).clone()
    if chosen is not None:
        for head, positions in enumerate(chosen.expand(2, -1)):
            mask[head, :, positions] = True
    expected = F.scaled_dot_product_attention(
        queries, keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    )
    found = chunked_attention(queries, keys, values, frame_map, window, chosen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_anchors_are_what_the_sampled_queries_look_at():
    keys = torch.eye(6)[None].repeat(2, 1, 1)
    queries = torch.zeros(2, 3, 6)
    queries[0, :, 4], queries[1, :, 1] = 30.0, 20.0
    assert find_anchors(queries, keys, 2).tolist() == [1, 4]
    assert find_anchors(queries, keys, 1, per_head=True).tolist() == [[4], [1]]


def test_the_schedule_of_mars():
    policy, layers = Mars(text=2, ratio=2, group=4, pyramid=2, text_pyramid=2), 12
    assert policy.entries(layers) == [4, 8]
    starts = [policy.plan(StepContext(step, 0, layers)).start for step in range(1, 17)]
    assert [plan.get("text") for plan in starts] == [None, 8, None, 4, None, 8, None, 0] * 2
    assert [plan.get("visual") for plan in starts] == [None] * 3 + [8] + [None] * 3 + [4] + [None] * 3 + [8] + [
        None
    ] * 3 + [0]
    assert all(plan[segment] == 0 for plan in starts for segment in ("before", "block", "after"))
    flat = [Mars(text=2, ratio=2, group=4, pyramid=2).plan(StepContext(step, 0, layers)).start for step in range(1, 17)]
    assert [plan.get("text") for plan in flat] == [None, 0] * 8
    assert [plan.get("visual") for plan in flat] == [plan.get("visual") for plan in starts]


@given(policy=st.builds(Mars, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)))
def test_a_shallow_refresh_includes_the_deeper_groups(policy):
    """Whatever is due at a group is due at every deeper one."""
    for step in range(1, 60):
        for interval in (policy.text, policy.text * policy.ratio):
            due = policy._due_groups(16, step, interval, policy.pyramid)
            firsts = [0, *policy.entries(16)]
            assert due == list(reversed(firsts[len(firsts) - len(due) :]))


def test_drift_decides_where_a_refresh_starts():
    policy = Mars(group=4, drift=0.1)
    drift = {"text": [0.0, 0.2, 0.3], "visual": [0.05, 0.1, 0.1]}
    assert policy.plan(StepContext(5, 0, 12, drift)).start.get("text") == 4
    assert "visual" not in policy.plan(StepContext(5, 0, 12, drift)).start
    assert "text" not in policy.plan(StepContext(16, 0, 12)).start  # the clock is off


def test_drift_above_nothing_renews_everything_that_moved(small):
    """A threshold that any movement passes refreshes often, an unreachable one never; both probe in every step."""
    index = layout(2, [6] * 4, 4)
    states = {}
    for drift in (1e-9, 2.0):
        cache = f"mars:drift={drift},probes=3,window=1,anchors=4,group=1"
        (states[drift],) = decode(small.model, random_request(small.model, index, cache=cache))
    assert states[2.0].statistics.refreshes == {"text": 1, "visual": 1}
    prompt, probes = len(index), 2 * 3
    assert states[2.0].statistics.layer_tokens == (prompt + 16 + 15 * (16 + probes),) * 2
    assert states[1e-9].statistics.refreshes["text"] >= 8


def test_the_work_of_each_policy(small):
    index = layout(2, [6] * 4, 4)
    prompt, slots, steps = len(index), 16, 16
    everything = prompt + slots
    expected = {
        "none": everything * steps,
        "full": everything * steps,
        "prefix": 2 * everything + 7 * 16 + 7 * 8,
        "dual": 2 * everything + 14 * 8,
        "frozen": everything + 15 * 16,
        "sparse": 4 * everything + 12 * 8,
    }
    for cache, count in expected.items():
        (state,) = decode(small.model, random_request(small.model, index, cache=cache))
        assert state.statistics.layer_tokens == (count, count), cache
    (state,) = decode(
        small.model, random_request(small.model, index, cache="mars:text=4,ratio=2,pyramid=1,window=1,anchors=4")
    )
    assert state.statistics.refreshes == {"text": 4, "visual": 2}
    (state,) = decode(small.model, random_request(small.model, index, cache="interval:prompt=8,response=4"))
    assert state.statistics.layer_tokens == (2 * everything + 14 * 16, 2 * everything + 2 * 16 + 12 * 4)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("lazy", "unknown cache 'lazy'"), ("none:x=1", "unknown cache"), ("mars:speed=2", "no setting 'speed'"),
        ("mars:text=often", "must be a whole number"), ("mars:ratio=0", "ratio must be"),
        ("mars:per_head=maybe", "true or false"), ("interval:share=0", "share"), ("sparse:keep=2", "keep"),
        ("mars:drift=nan", "cache mars: drift must be a number"), (f"mars:text={10**18}", "text must be"),
        ("interval:share=inf", "share must be"), ("mars:text=" + "9" * 5000, "must be a whole number"),
        ("frozen:every=2", "no setting 'every'"), ("dual:every=-1", "every must be a whole number of at least 0"),
    ],
)  # fmt: skip
def test_bad_policies_are_refused(cache, message):
    with pytest.raises(InputError, match=message):
        parse_policy(cache)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("mars:window=1,anchors=99", "99 anchors are more than the 8"),
        ("mars:window=2,anchors=1", "window of 2"),
        ("mars:anchors=4", "anchors=4 is part of chunk attention; give a window"),
        ("mars:scene=0.5", "scene=0.5 is part"),
    ],
)
def test_policies_that_do_not_fit_the_video_are_refused(small, cache, message):
    with pytest.raises(InputError, match=message):
        decode(small.model, random_request(small.model, layout(1, [4, 4], 1), cache=cache))


def test_every_policy_is_tried_here():
    assert {name.partition(":")[0] for name in (*EXACT, *APPROXIMATE)} == set(POLICIES)


@pytest.mark.parametrize("frames", [[], [1], [3], [1, 1], [2, 5, 1]])
def test_the_default_fits_any_video(frames):
    model = load_reference_model("gqa")
    (state,) = decode(model, random_request(model, layout(2, frames, 2), cache="mars"))
    assert state.done


def test_scenes_are_cut_where_frames_change_abruptly():
    frames = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    sizes = [2, 1, 3, 1, 2]
    assert [scene.tolist() for scene in scenes_of(frames, sizes, 0.5)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert [scene.tolist() for scene in scenes_of(frames, sizes, 0.0)] == [list(range(9))]
    assert [scene.tolist() for scene in scenes_of(frames[:1], sizes[:1], 0.5)] == [[0, 1]]


def test_every_scene_has_its_own_anchors():
    model = load_reference_model("gqa")
    index = layout(3, [5, 5, 5, 5], 4)
    request = random_request(model, index, cache="mars:scene=0.5,window=1,anchors=4")
    direction = torch.randn(request.prompt.shape[1])
    with_scenes = request.prompt.clone()
    with_scenes[3:13], with_scenes[13:23] = direction, -direction  # two scenes of two frames
    denoiser = Denoiser(model)
    denoiser.add(replace(request, prompt=with_scenes))
    denoiser.step()
    found = denoiser.rows[0].caches[0].attention.anchors
    for anchors in found.values():
        assert ((anchors >= 3) & (anchors < 13)).sum() == ((anchors >= 13) & (anchors < 23)).sum() == 2


@pytest.mark.parametrize(
    "cache", ["frozen", "mars:text=2,ratio=1,window=1,anchors=4", "mars:text=2,drift=0.01,window=1,anchors=4"]
)
def test_a_further_question_reuses_the_frames(cache):
    model = load_reference_model("gqa")
    index = layout(3, [5, 5, 5], 4)
    first = random_request(model, index, cache=cache, reuse=99)
    (left,) = decode(model, first)
    assert left.visual is not None
    (again,) = decode(model, replace(first, visual=left.visual))
    assert again.statistics.refreshes["visual"] == left.statistics.refreshes["visual"] - 1
    denoiser = Denoiser(model)
    denoiser.add(replace(first, visual=left.visual))
    denoiser.step()
    kv_cache = denoiser.rows[0].caches[0].kv_cache
    probed = 8 if "drift" in cache else 0
    assert kv_cache.computed == [len(index) + 16 - 15 + probed] * len(kv_cache.computed)
    own = torch.stack([states[:, 3:18] for states in kv_cache.layers])
    kept = (own == torch.stack(left.visual.layers)).all(-1).all(0).all(0)
    assert kept.sum() >= 15 - probed


def test_what_does_not_fit_is_not_reused():
    model = load_reference_model("gqa")
    (left,) = decode(model, random_request(model, layout(3, [5, 5], 4), cache="frozen", reuse=99))
    elsewhere = random_request(model, layout(4, [5, 5], 4), cache="frozen", reuse=99)
    (alone,) = decode(model, elsewhere)
    (given,) = decode(model, replace(elsewhere, visual=left.visual))
    assert given.statistics.refreshes == alone.statistics.refreshes
    assert torch.equal(given.proposed, alone.proposed)
    with pytest.raises(InputError, match="reuse needs a cache"):
        GenerationSettings(reuse=99)


def test_the_paper_is_a_preset_of_mars():
    paper = parse_policy("mars:paper")
    assert (paper.ratio, paper.queries, paper.window, paper.group) == (2, 32, 1, 4)
    assert parse_policy("mars:paper,ratio=3") == parse_policy("mars:ratio=3,paper") == replace(paper, ratio=3)
    assert parse_policy(policy_text(paper)) == paper


def test_dllm_cache_chooses_everything_when_all_is_due():
    """Refreshing prompt and answer in every step is full recompute, and any share of 1 is the frozen prompt."""
    model, index = load_reference_model("gqa"), layout(2, [4, 4], 3)
    for cache, like in (("dllm:prompt=1,response=1", "full"), ("dllm:prompt=999,share=1", "frozen")):
        found, expected = decode(
            model, random_request(model, index, cache=cache), random_request(model, index, cache=like)
        )
        assert found.answer_ids() == expected.answer_ids()


def test_dllm_cache_computes_a_share_of_the_answer_in_every_layer(small):
    index = layout(2, [6] * 4, 4)
    (state,) = decode(small.model, random_request(small.model, index, cache="dllm:prompt=5,response=3"))
    both, prompt, response, neither = 2 * (len(index) + 2 * 16), 2 * (len(index) + 4), 4 * 16, 8 * 4  # of 16 steps
    # where both are due, the answer is in the full pass too
    assert state.statistics.layer_tokens == (both + prompt + response + neither,) * 2


def test_dllm_cache_keeps_values_of_all_slots_and_keys_of_the_chosen(small):
    index = layout(2, [6] * 4, 4)
    denoiser = Denoiser(small.model)
    denoiser.add(random_request(small.model, index, cache="dllm:share=0.1", block_length=16, steps=4))
    for _ in range(3):
        denoiser.step()
    (cache,), language_model = denoiser.rows[0].caches, small.model.language_model
    kv_cache, answer = cache.kv_cache, cache.answer
    rotation = language_model.rotation(kv_cache.tokens, torch.float32, answer.device)[:, answer]
    with torch.inference_mode():
        _, fresh = language_model.enter(language_model.layers[0], kv_cache.hidden[0][answer], rotation)
    same = torch.isclose(kv_cache.select(0, answer), fresh, atol=1e-6).all(-1).view(2, -1, 16).all(1)
    assert same[1].all() and not same[0].all()


def test_dkv_cache_computes_what_was_open_in_the_step_before(small):
    index = layout(2, [6] * 4, 4)
    (state,) = decode(small.model, random_request(small.model, index, cache="dkv:every=99"))
    assert state.statistics.layer_tokens == (len(index) + 16 + sum(range(2, 17)),) * 2


def test_what_verifies_tokens_reads_what_a_sparse_step_wrote(small):
    """A sparse step writes its block's keys beside those it looks at; WINO predicts tokens from the whole cache."""
    denoiser = Denoiser(small.model)
    denoiser.add(random_request(small.model, layout(2, [3, 3], 2), cache="sparse", commit="wino"))
    (row,) = denoiser.rows
    (cache,) = row.caches
    compared = 0
    while denoiser.rows:
        denoiser.step()
        for layer, seen in cache.attention.compact.items():
            assert torch.equal(seen[:, :8], cache.kv_cache.select(layer, cache.segment("block")))
            compared += cache.step_in_block > 1  # a step of the block alone
    assert compared


@pytest.mark.parametrize("similarity", [0.0, 1.0])
def test_elastic_cache_recomputes_above_the_layer_that_changed(similarity):
    model, index = load_reference_model("gqa"), layout(2, [4, 4], 3)
    (state,) = decode(model, random_request(model, index, cache=f"elastic:similarity={similarity}"))
    lowest, *_, highest = state.statistics.layer_tokens
    cheap = len(index) + 16 + 16 + 14 * 8
    assert lowest == cheap  # the first layer is compared, not recomputed
    assert highest > cheap if similarity else highest == cheap


def test_elastic_cache_that_finds_a_change_everywhere_is_full_recompute_above_the_first_layer():
    """Recomputed from the second layer in every step: exactly what a group of all layers but the first does."""
    model, index = load_reference_model("gqa"), layout(2, [4, 4], 3)
    request = random_request(model, index, cache="elastic:similarity=1")
    denoiser = Denoiser(model)
    denoiser.add(request)
    for _ in range(3):
        denoiser.step()
        cache = denoiser.rows[0].caches[0]
        pattern = cache.attention
        pattern.watched = None if pattern.watched is None else (pattern.watched[0], -pattern.watched[1])
    states, top = cache.kv_cache.hidden, model.language_model.config.num_hidden_layers
    others = PartialPass(cache.kv_cache, {1: torch.arange(len(index) + 16)})
    before = states[top][cache.answer].clone()
    refresh(model.language_model, [others])
    torch.testing.assert_close(states[top][cache.answer][:8], before[:8])


@pytest.mark.parametrize("cache", ["frozen", "mars:text=2,ratio=1,window=1,anchors=4,group=1"])
def test_a_further_question_reuses_the_frames_of_some_layers(cache):
    """Below the layer nothing of the frames is computed in the first step; from there on everything is."""
    model, index = load_reference_model("gqa"), layout(3, [5, 5, 5], 4)
    first = random_request(model, index, cache=cache, reuse=1)
    (left,) = decode(model, first)
    assert left.visual is not None and len(left.visual.layers) == 1
    denoiser = Denoiser(model)
    denoiser.add(replace(first, visual=left.visual))
    denoiser.step()
    kv_cache, everything = denoiser.rows[0].caches[0].kv_cache, len(index) + 16
    assert kv_cache.computed == [everything - 15, *[everything] * (len(kv_cache.computed) - 1)]
    assert torch.equal(kv_cache.layers[0][:, 3:18], left.visual.layers[0])
