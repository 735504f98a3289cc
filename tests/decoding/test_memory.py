"""Memory of requests, against what they really keep."""

import pytest
import torch

from vidlada.decoding.cache import RequestCache
from vidlada.decoding.choices import policy_of
from vidlada.decoding.memory import decoding_bytes, kept_bytes
from vidlada.decoding.policies import POLICIES
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.engine.entry import ReadyEntry
from vidlada.generation import GenerationSettings

INDEX = [-1] * 3 + [number for number in range(4) for _ in range(5)] + [-1] * 4


def make_request(model, **changes):
    settings = GenerationSettings(gen_length=16, block_length=8).replace(**changes)
    return Request(torch.randn(len(INDEX), model.config.text.hidden_size) * 0.2, settings, frame_index=INDEX)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0}, {"reuse": 1}, {"reuse": 2}])
@pytest.mark.parametrize("cache", [*POLICIES, "mars:group=1", "sparse:keep=0.2"])
def test_what_a_request_keeps(small, cache, options):
    model, request = small.model, make_request(small.model, cache=cache, **options)
    denoiser = Denoiser(model)
    denoiser.add(request)
    (row,), states = denoiser.rows, []
    while denoiser.rows:
        states = denoiser.step()
    ((_, last),) = states
    kept = sum(own.kv_cache.nbytes() for own in row.caches)
    kept += sum(sum(t.nbytes for t in own.attention.compact.values()) for own in row.caches)
    kept += sum(getattr(own.attention, "added", torch.empty(0)).nbytes for own in row.caches)
    kept += 0 if last.visual is None else last.visual.nbytes
    expected = kept_bytes(model.config.text, len(INDEX) + 16, 20, request.settings, 4)
    assert kept <= expected <= kept * 1.1


def test_requests_together_take_what_they_take_apart(small):
    def entry(**changes):
        return ReadyEntry(make_request(small.model, **changes), small.model, pytest.fail)

    config, dual = small.model.config.text, entry(cache="dual")
    shape = dual.tokens, 20, dual.settings
    assert decoding_bytes(config, [shape] * 2, 4).peak == 2 * dual.memory.peak > 2 * entry().memory.peak


@pytest.mark.parametrize(
    "options", [{"cache": "dual"}, {"cache": "mars", "reuse": 1}, {"cache": "full", "cfg_scale": 1.0}]
)
def test_one_of_two_processes_keeps_half_of_the_heads(small, options):
    config, settings = small.model.config.text, GenerationSettings(gen_length=16, block_length=8, **options)
    heads = config.num_key_value_heads // 2
    prompt = torch.randn(len(INDEX), config.hidden_size)
    caches = [
        RequestCache(config, policy_of(settings), prompt, INDEX, 16, len(INDEX) + 16, reuse=settings.reuse, heads=heads)
        for _ in range(1 + (settings.cfg_scale > 0))
    ]
    for cache in caches:
        embed = torch.nn.Embedding(8, config.hidden_size)
        none = torch.zeros(16, dtype=torch.long)
        cache.next_pass(none, slice(0, 8), none == 0, embed, none[:0])
    kept = sum(cache.kv_cache.nbytes() for cache in caches)
    if settings.reuse:
        kept += caches[0].export_visual().nbytes
    assert kept_bytes(config, len(INDEX) + 16, 20, settings, 4, processes=2) == kept
    shape = len(INDEX) + 16, 20, settings
    whole, half = (decoding_bytes(config, [shape], 4, processes).working for processes in (1, 2))
    assert half < whole


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_what_a_commit_rule_keeps(small, cache):
    model, request = small.model, make_request(small.model, cache=cache, commit="credit:confidence=1")
    denoiser = Denoiser(model)
    denoiser.add(request)
    denoiser.step()
    before = denoiser.rows[0].rule.credit
    undo = denoiser.rows[0].rollback()  # as a step begins
    denoiser.rows[0].rule.adjust(torch.zeros_like(before))
    kept = before.nbytes + denoiser.rows[0].rule.credit.nbytes
    undo()
    assert denoiser.rows[0].rule.credit is before
    with_rule, without = (
        kept_bytes(model.config.text, 100, 20, request.settings.replace(commit=rule), 4)
        for rule in (request.settings.commit, "topk")
    )
    assert with_rule - without == kept


def test_room_beside_the_sequence_for_what_is_verified(small):
    request = make_request(small.model, cache="dual", commit="wino")
    denoiser = Denoiser(small.model)
    denoiser.add(request)
    denoiser.step()
    kept = denoiser.rows[0].caches[0].kv_cache.nbytes()
    assert kept_bytes(small.model.config.text, len(INDEX) + 16, 20, request.settings, 4) == kept
