"""KV caches in 8 bits: near the wide ones, smaller by as much as they say, and the same in a batch as alone."""

import pytest
import torch
from random_requests import decode, random_request
from vectors import load_reference_model

from vidlada.decoding.kv_cache import KVCache
from vidlada.decoding.memory import kept_bytes
from vidlada.decoding.small_kv import Float8KVCache, Int8KVCache, kv_cache_of, stored_bytes
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDATextConfig

CONFIG = VidLaDATextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)


FRAMES = [-1, -1, *(frame for frame in range(4) for _ in range(5)), -1, -1, -1]


def make_request(model, seed, **changes):
    return random_request(model, FRAMES, seed, **changes)


def filled(kind, dtype=torch.float32):
    """A cache of 10 tokens whose first layer holds rows of very different sizes, and what was written."""
    cache = kind(CONFIG, torch.zeros(10, 64, dtype=dtype))
    states = torch.randn(4, 10, 16, dtype=dtype) * 10.0 ** torch.arange(-3, 7)[:, None].to(dtype)
    cache.write(0, torch.arange(10), states)
    return cache, states


@pytest.mark.parametrize(("kind", "step"), [(Int8KVCache, 0.51 / 127), (Float8KVCache, 1 / 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_keeps_its_own_scale(kind, step, dtype):
    cache, states = filled(kind, dtype)
    found = torch.cat(cache.read(0))
    assert found.dtype == dtype
    largest = states.float().abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps
    assert ((found.float() - states.float()).abs() / largest).max() <= step + rounding
    assert torch.equal(cache.select(0, torch.tensor([7, 2])), found[:, [7, 2]])
    cache.write(0, torch.arange(10), found)  # what was read may be written again without a further loss
    torch.testing.assert_close(torch.cat(cache.read(0)), found)


@pytest.mark.parametrize("kind", ["auto", "int8", "float8"])
def test_dropped_rows_take_their_scales_along(kind):
    cache, _ = filled(kv_cache_of(kind))
    before, places = torch.cat(cache.read(0)), torch.tensor([1, 4, 9])
    cache.keep(places)
    assert torch.equal(torch.cat(cache.read(0)), before[:, places])
    cache.keep(torch.tensor([0, 2]))
    assert torch.equal(torch.cat(cache.read(0)), before[:, [1, 9]]) and cache.position_ids.tolist() == [1, 9]


@pytest.mark.parametrize("kind", ["auto", "int8", "float8"])
def test_further_rows_are_seen_and_not_kept(kind):
    """As WINO's masks are: after all others, and gone with the next ones; also once rows were dropped."""
    cache, further = kv_cache_of(kind)(CONFIG, torch.zeros(10, 64), spare=3), torch.randn(4, 2, 16)
    cache.write(0, torch.arange(10), torch.randn(4, 10, 16))
    for count in (10, 4):
        before = torch.cat(cache.read(0))
        found = torch.cat(cache.read_with(0, further))
        assert torch.equal(found[:, :count], before) and torch.equal(found[:, count:], further)
        assert torch.equal(torch.cat(cache.read(0)), before)
        cache.keep(torch.arange(0, count, 3))


@pytest.mark.parametrize("kind", ["auto", "int8", "float8"])
def test_memory_is_what_is_said(kind):
    cache = kv_cache_of(kind)(CONFIG, torch.zeros(50, 64, dtype=torch.bfloat16))
    hidden = sum(states.nbytes for states in cache.hidden.values())
    layer = 2 * 2 * 50 * 16 * 2 if kind != "auto" else 0  # one layer's, widened
    assert cache.nbytes() - hidden + layer == stored_bytes(CONFIG, 50, 2, kind)


def test_estimates_count_it():
    wide, narrow = (
        kept_bytes(VidLaDATextConfig(), 13_700, 13_440, GenerationSettings(cache="dual", kv_dtype=kind), 2)
        for kind in ("auto", "int8")
    )
    assert 0.5 < narrow / wide < 0.6


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize(
    "cache",
    ["full", "dual", "sparse", "elastic", "dllm", "interval", "mars:drift=0.01",
     "mars:text=1,ratio=1,window=1,anchors=4"],
)  # fmt: skip
def test_alone_in_a_batch_and_on_fixed_buffers(kind, cache):
    model = load_reference_model("gqa")
    requests = [make_request(model, 6, cache=cache, kv_dtype=kind, commit="wino"), make_request(model, 7, cache="dual")]
    (alone,) = decode(model, requests[0])
    for found in (decode(model, *requests)[0], decode(model, *requests, static=True)[0]):
        assert found.proposed.tolist() == alone.proposed.tolist()


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("float8", 0.1)])
def test_predictions_stay_near(kind, tolerance):
    """Confidences of the first step, of which most are those of one model."""
    model, found = load_reference_model("mha"), {}
    for each in ("auto", kind):
        request = make_request(model, 8, cache="full", kv_dtype=each, gen_length=8, block_length=8, steps=1)
        found[each] = decode(model, request)[0].confidence
    assert 0 < (found[kind] - found["auto"]).abs().max() < tolerance


def test_without_a_cache_it_is_refused():
    with pytest.raises(InputError, match="kv_dtype int8 needs a cache"):
        GenerationSettings(kv_dtype="int8")
    with pytest.raises(InputError, match="kv_dtype must be auto or int8 or float8, not 'int4'"):
        GenerationSettings(kv_dtype="int4", cache="dual")
    assert kv_cache_of("auto") is KVCache
