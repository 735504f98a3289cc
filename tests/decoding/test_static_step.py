"""Passes over fixed buffers give what eager ones give, whatever the policy, the batch and who joins or leaves."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vectors import load_reference_model

from vidlada.decoding.sampler import Denoiser, Request
from vidlada.decoding.static_step import GRAPHS, MAX_ROWS, GraphCapture, LayerGraphs, graphs_of
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
    {"visual_prune": "redvtp:keep=0.5"},
    {"kv_dtype": "int8"},
    {"commit": "wino"},
    {"commit": "credit"},
    {"commit": "prophet"},
    {"commit": "entropy"},
    {"commit": "stable"},
]


@pytest.fixture(autouse=True)
def no_graphs():
    """The models are shared; no other test runs with the graphs of these."""
    GRAPHS.clear()
    yield
    GRAPHS.clear()


def make_request(model, cache, pace, frames, seed, stop):
    index = [-1] * 2 + [number for number in range(frames) for _ in range(4)] + [-1] * 3
    width = model.config.text_config.hidden_size
    prompt = torch.randn(len(index), width, generator=torch.Generator().manual_seed(seed)) * 0.2
    settings = GenerationSettings(gen_length=16, block_length=8, cache=cache, seed=seed).replace(**pace)
    return Request(prompt, settings, frame_index=index, stop_sequences=stop)


def decode(model, requests, static, every=2, leave_after=None):
    """Let a request join every few steps, and the first leave after some; every state of each."""
    denoiser, states, waiting, steps = Denoiser(model, static), {}, list(requests), 0
    while denoiser.rows or waiting:
        if waiting:
            denoiser.add(waiting.pop(0))
        for _ in range(every):
            for number, state in denoiser.step() if denoiser.rows else ():
                states.setdefault(number, []).append(state)
            steps += 1
            if steps == leave_after:
                denoiser.remove(0)
    return states


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for number, states in one.items():
        assert len(states) == len(other[number])
        for eager, static in zip(states, other[number], strict=True):
            assert torch.equal(eager.proposed, static.proposed)
            assert torch.equal(eager.confidence, static.confidence)
            assert eager.statistics.layer_tokens == static.statistics.layer_tokens


kinds = st.tuples(st.sampled_from(CACHES), st.sampled_from(PACES), st.integers(2, 4), st.integers(0, 50))


@pytest.mark.slow
@given(
    chosen=st.lists(kinds, min_size=1, max_size=4),
    stop=st.sampled_from([(), ((7,),), ((11, 12), (40,))]),
    every=st.integers(1, 4),
    leave_after=st.none() | st.integers(1, 12),
)
@hypothesis_settings(max_examples=25)
def test_the_same_as_eager(small, chosen, stop, every, leave_after):
    requests = [make_request(small.model, *kind, stop) for kind in chosen]
    found = [decode(small.model, requests, static, every, leave_after) for static in (False, True)]
    assert_equal(*found)


@pytest.mark.slow
@given(chosen=st.lists(kinds, min_size=1, max_size=3))
@hypothesis_settings(max_examples=15)
def test_padding_to_multiples_changes_no_answer(chosen):
    model = load_reference_model("gqa")
    requests = [make_request(model, *kind, ()) for kind in chosen]
    eager = decode(model, requests, False)
    GRAPHS[model.language_model] = LayerGraphs(16)
    padded = decode(model, requests, True)
    assert GRAPHS[model.language_model].sizes.keys() <= set(range(16, MAX_ROWS + 1, 16))
    for number, states in eager.items():
        assert torch.equal(states[-1].proposed, padded[number][-1].proposed)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dual", "mars", "sparse", "dkv"])
def test_joins_and_leaves_lose_no_graphs(cache):
    """Of the parts that eight requests of different lengths run, each is captured once, and that is all."""
    model = load_reference_model("gqa")
    graphs = GRAPHS[model.language_model] = LayerGraphs(16)
    requests = [make_request(model, cache, {}, 60 + number, number, ()) for number in range(8)]
    decode(model, requests, True, every=5, leave_after=30)
    parts = 2 * model.config.text.num_hidden_layers * MAX_ROWS // 16
    assert graphs.eager <= parts and graphs.captures <= parts
    assert graphs.replays > 0.8 * (graphs.replays + graphs.eager)
    eager, captures = graphs.eager, graphs.captures
    decode(model, requests, True, every=5, leave_after=30)  # what is captured serves the next answers too
    assert (graphs.eager, graphs.captures) == (eager, captures)


def test_moved_weights_are_captured_anew():
    model = copy.deepcopy(load_reference_model("gqa"))  # the reference is shared
    graphs = GRAPHS[model.language_model] = LayerGraphs(1)
    request = make_request(model, "dual", {}, 2, 0, ())
    decode(model, [request], True)
    known = next(iter(graphs.sizes.values()))
    decode(model, [request], True)
    assert known in graphs.sizes.values()
    model.double().float()
    expected = decode(model, [request], False)
    assert_equal(expected, decode(model, [request], True))
    assert known not in graphs.sizes.values()


def test_wide_passes_stay_eager():
    model = load_reference_model("gqa")
    graphs = GRAPHS[model.language_model] = LayerGraphs(1)
    decode(model, [make_request(model, "full", {}, MAX_ROWS // 4, 0, ())], True)
    assert graphs.sizes.keys() == {16}  # the answer's rows, which alone leave the last layer
    assert graphs.eager == graphs.captures == 1


def test_the_layers_own_functions_come_back_after_an_error(small):
    language_model = small.model.language_model
    plain = language_model.enter, language_model.leave
    with pytest.raises(ZeroDivisionError), graphs_of(language_model).replacing(language_model):
        assert language_model.enter is not plain[0]
        raise ZeroDivisionError
    assert (language_model.enter, language_model.leave) == plain


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stands for what a capture asks of CUDA; the error, if any, is raised by the first capture's end."""
    calls = SimpleNamespace(begun=0, error=None)

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.begun += 1
            assert capture_error_mode == "thread_local"

        def capture_end(self):
            if calls.error:
                raise calls.error

        def replay(self):
            pass

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {
        "CUDAGraph": Graph, "Stream": lambda device: Stream(), "current_stream": lambda device: Stream(),
        "stream": lambda stream: nullcontext(), "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def test_after_a_failed_capture_parts_run_eagerly(fake_cuda, caplog):
    """With one warning, not one for each part."""
    capture, runs = GraphCapture(torch.device("cuda", 1)), []
    capture(lambda: runs.append(1))
    assert runs == [1]
    fake_cuda.error = RuntimeError("operation not permitted when stream is capturing")

    def run():
        runs.append(2)

    with caplog.at_level("WARNING"):
        assert capture(run) is run and capture(run) is run
    assert fake_cuda.begun == 2 and len(caplog.records) == 1 and "not permitted" in caplog.text


def test_running_out_of_memory_in_a_capture_is_not_a_failed_capture(fake_cuda):
    capture = GraphCapture(torch.device("cuda"))
    fake_cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        capture(lambda: None)
    assert not capture.failed
