"""Memory of requests, against what they really keep."""

import pytest
import torch

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
    assert decoding_bytes(config, [shape] * 2, 4).peak == 2 * dual.bytes > 2 * entry().bytes
