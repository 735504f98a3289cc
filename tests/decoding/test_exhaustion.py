"""A step that fails for lack of memory, wherever in it, can be made again with the same result."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vidlada.decoding.memory import is_out_of_memory
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.generation import GenerationSettings
from vidlada.model.language_model import MLP

CACHES = [
    "none", "full", "prefix:every=3", "dual", "interval:prompt=6,response=3", "sparse", "mars:text=2,ratio=2,group=1",
    "mars:text=2,ratio=2,group=1,window=1,anchors=4", "mars:drift=0.01,group=1", "dkv:every=4",
    "dllm:prompt=5,response=3", "elastic",
]  # fmt: skip
PACES = [
    {}, {"threshold": 0.05}, {"cfg_scale": 1.0}, {"temperature": 0.6}, {"noise": "counter", "temperature": 0.6},
    {"remasking": "random"}, {"commit": "wino"}, {"commit": "credit"}, {"commit": "stable"}, {"reuse": 1},
]  # fmt: skip


def request(model, cache, pace, seed):
    index = [-1] * 2 + [number for number in range(3) for _ in range(4)] + [-1] * 3
    width = model.config.text_config.hidden_size
    prompt = torch.randn(len(index), width, generator=torch.Generator().manual_seed(seed)) * 0.2
    pace = {name: value for name, value in pace.items() if (name, cache) != ("reuse", "none")}
    settings = GenerationSettings(gen_length=16, block_length=8, cache=cache, seed=seed).replace(**pace)
    return Request(prompt, settings, frame_index=index)


class Shortage:
    """Stands for a GPU whose memory runs out in the nth of some products, once."""

    def __init__(self):
        self.left = None
        self.gate = MLP.gate

    def __call__(self, mlp, hidden):
        if self.left == 0:
            self.left = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.left = None if self.left is None else self.left - 1
        return self.gate(mlp, hidden)


def decode(model, requests, failures=()):
    """States of every request; in the steps named, memory runs out after so many products, and the step is repeated."""
    shortage, failures = Shortage(), dict(failures)
    denoiser, states, step = Denoiser(model, False), {}, 0
    for each in requests:
        denoiser.add(each)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLP, "gate", lambda mlp, hidden: shortage(mlp, hidden))
        while denoiser.rows:
            shortage.left = failures.get(step)
            step += 1
            try:
                found = denoiser.step()
            except torch.OutOfMemoryError:
                assert len(denoiser.rows) == len(requests) - sum(own[-1].done for own in states.values())
                if denoiser.unusable:
                    return states, denoiser.unusable
                found = denoiser.step()
            for number, state in found:
                states.setdefault(number, []).append(state)
    return states, set()


kinds = st.tuples(st.sampled_from(CACHES), st.sampled_from(PACES), st.integers(0, 50))
failing = st.dictionaries(st.integers(0, 20), st.integers(0, 8), min_size=1, max_size=4)


@pytest.mark.slow
@given(chosen=st.lists(kinds, min_size=1, max_size=2), failures=failing)
@hypothesis_settings(max_examples=40)
def test_a_repeated_step(small, chosen, failures):
    expected, _ = decode(small.model, [request(small.model, *kind) for kind in chosen])
    found, unusable = decode(small.model, [request(small.model, *kind) for kind in chosen], failures)
    for number in unusable:
        assert chosen[number][0].partition(":")[0] in ("dllm", "interval")
    for number, states in found.items():
        assert len(states) == len(expected[number]) or unusable
        for one, other in zip(states, expected[number], strict=False):
            assert torch.equal(one.proposed, other.proposed)
            assert torch.equal(one.confidence, other.confidence)
            assert (one.statistics.steps, one.statistics.tokens) == (other.statistics.steps, other.statistics.tokens)
            assert one.statistics.layer_tokens == other.statistics.layer_tokens
            assert one.statistics.refreshes == other.statistics.refreshes


@pytest.mark.parametrize(("cache", "unusable"), [("dual", set()), ("dllm", {0}), ("interval", {0})])
def test_what_compares_with_what_it_overwrites_cannot_be_repeated(small, cache, unusable):
    _, found = decode(small.model, [request(small.model, cache, {}, 0)], {2: 1})
    assert found == unusable


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_running_out_of_memory_is_told(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_a_cpu_says_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
