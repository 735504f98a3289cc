"""Passes over fixed buffers give what eager ones give, whatever the policy, the batch and who joins or leaves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vectors import load_reference_model

from vidlada.decoding.kv_cache import KVCache, PartialPass, refresh
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.decoding.static_step import MAX_POSITIONS, MAX_RECORDS, StaticStep, pass_key
from vidlada.generation import GenerationSettings

CACHES = [
    "full", "prefix", "prefix:every=3", "dual", "frozen", "interval:prompt=6,response=3", "sparse", "sparse:keep=0.2",
    "mars:text=2,ratio=2,group=1", "mars:text=2,ratio=2,group=1,window=1,anchors=4", "mars:drift=0.01,group=1",
    "dkv:every=4", "dllm:prompt=5,response=3", "elastic",
]  # fmt: skip
PACES = [
    {},
    {"steps": 4},
    {"threshold": 0.05},
    {"cfg_scale": 1.0},
    {"temperature": 0.6},
    {"block_length": 4},
    {"commit": "wino"},
    {"commit": "credit"},
    {"commit": "prophet"},
    {"commit": "entropy"},
    {"commit": "stable"},
]


def request(model, cache, pace, frames, seed, stop):
    index = [-1] * 2 + [number for number in range(frames) for _ in range(4)] + [-1] * 3
    width = model.config.text_config.hidden_size
    prompt = torch.randn(len(index), width, generator=torch.Generator().manual_seed(seed)) * 0.2
    settings = GenerationSettings(gen_length=16, block_length=8, cache=cache, seed=seed).replace(**pace)
    return Request(prompt, settings, frame_index=index, stop_sequences=stop)


def decode(model, requests, static):
    """Let a request join every other step; every state of each."""
    denoiser, states, waiting = Denoiser(model, static), {}, list(requests)
    while denoiser.rows or waiting:
        if waiting:
            denoiser.add(waiting.pop(0))
        for _ in range(2):
            for number, state in denoiser.step() if denoiser.rows else ():
                states.setdefault(number, []).append(state)
    return states, denoiser.refresh


kinds = st.tuples(st.sampled_from(CACHES), st.sampled_from(PACES), st.integers(2, 4), st.integers(0, 50))


@pytest.mark.slow
@given(chosen=st.lists(kinds, min_size=1, max_size=3), stop=st.sampled_from([(), ((7,),), ((11, 12), (40,))]))
@hypothesis_settings(max_examples=25, deadline=None)
def test_the_same_as_eager(small, chosen, stop):
    requests = [request(small.model, *kind, stop) for kind in chosen]
    eager, _ = decode(small.model, requests, False)
    static, _ = decode(small.model, requests, True)
    assert eager.keys() == static.keys()
    for number, states in eager.items():
        assert len(states) == len(static[number])
        for one, other in zip(states, static[number], strict=True):
            assert torch.equal(one.proposed, other.proposed)
            assert torch.equal(one.confidence, other.confidence)
            assert one.statistics.layer_tokens == other.statistics.layer_tokens


@pytest.mark.parametrize(("cache", "captures", "eager"), [("dual", 1, 3), ("frozen", 1, 2), ("sparse", 2, 6)])
def test_most_steps_are_replayed(cache, captures, eager):
    model = load_reference_model("gqa")
    asked = request(model, cache, {}, 60, 0, ())  # too many positions for a full pass to be static
    _, step = decode(model, [asked], True)
    assert len(asked.prompt) + 16 > MAX_POSITIONS
    assert (step.captures, step.eager, step.replays) == (captures, eager, 16 - eager)


def test_long_passes_and_foreign_patterns_stay_eager(small):
    config = small.model.language_model.config
    kv_cache = KVCache(config, torch.zeros(MAX_POSITIONS + 1, config.hidden_size))
    long = PartialPass(kv_cache, {0: torch.arange(MAX_POSITIONS + 1)})
    short = replace(long, joins={0: torch.arange(4)})
    assert pass_key([long]) is None
    assert pass_key([short]) is not None
    assert pass_key([short]) != pass_key([replace(short, joins={0: torch.arange(3)})])
    assert pass_key([short]) != pass_key([replace(short, kv_cache=KVCache(config, torch.zeros(8, config.hidden_size)))])
    assert pass_key([replace(short, attention=lambda queries, keys, values, layer, active: queries)]) is None


@torch.no_grad()
def test_records_end_with_their_requests(small):
    language_model = small.model.language_model
    step, config = StaticStep(language_model), small.model.language_model.config
    for _ in range(3 * MAX_RECORDS):
        kv_cache = KVCache(config, torch.zeros(6, config.hidden_size))
        refresh(language_model, [PartialPass(kv_cache, {0: torch.arange(6)})])
        for _ in range(3):
            step([PartialPass(kv_cache, {0: torch.arange(2)})])
        del kv_cache
    assert len(step.records) == 1
    kept = [KVCache(config, torch.zeros(2, config.hidden_size)) for _ in range(MAX_RECORDS + 5)]
    for kv_cache in kept:
        step([PartialPass(kv_cache, {0: torch.arange(2)})])
    assert len(step.records) == MAX_RECORDS
