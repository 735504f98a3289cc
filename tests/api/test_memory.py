"""Runs that cannot fit are refused before they start, with what to do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vidlada
from vidlada import info
from vidlada.conversation import Conversation
from vidlada.decoding.sampler import Denoiser
from vidlada.engine.offline import MOST_WAITING
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDAConfig
from vidlada.model.free_memory import DeviceMemory, free_memory_of

DEVICE = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free."""

    def pretend(size):
        for module in ("info", "model.free_memory"):
            monkeypatch.setattr(f"vidlada.{module}.free_memory", lambda device: size)

    return pretend


def test_the_estimate_counts_what_a_cache_keeps():
    config = VidLaDAConfig()
    settings = GenerationSettings(gen_length=128)
    none, mars, reused = (
        info.memory_need(config, 8_000_000_000, 64, settings.replace(**changes), 2)
        for changes in ({"cache": "none"}, {"cache": "mars"}, {"cache": "mars", "reuse": 32})
    )
    assert reused.cache > 1.8 * mars.cache  # what a further question may reuse is a copy
    assert none.denoising == mars.denoising < mars.tokens * 2 * 4096 * 14 + 32 * 126_464 * 12  # logits of a block
    kept = mars.tokens * 2 * 4096 * 32 * 2  # keys and values in bfloat16
    states = mars.tokens * 4096 * 2 * 9  # entering the first layer and seven groups, leaving the last layer
    assert (none.cache, mars.cache) == (0, kept + states)
    assert mars.total == mars.weights + max(mars.vision, mars.denoising + mars.cache)
    assert 16e9 < mars.total < 40e9  # what people report of such models


def test_free_memory_of_this_machine():
    free = info.free_memory(DEVICE)
    assert free is None or 2**20 < free < 2**50
    assert info.free_memory(torch.device("meta")) is None


def test_a_video_that_cannot_fit_is_refused(free):
    model = vidlada.load()
    free(2**20)
    with pytest.raises(InputError, match=r"answering about \d+ frames needs about .* GiB are free on cpu; use fewer"):
        model.ask(np.zeros((40, 84, 84, 3), np.uint8), "what happens first ?")


def test_weights_that_cannot_fit_are_refused(free):
    free(2**10)
    with pytest.raises(InputError, match="loading .*tiny needs about"):
        vidlada.load()


def test_where_nothing_is_known_nothing_is_refused(free):
    free(None)
    info.check_memory(2**60, DEVICE, "this", "do that")


def devices_with(*sizes):
    """Free memory of devices with as many layers each."""
    return lambda model: [DeviceMemory(torch.device("cuda", n), 1 / len(sizes), free) for n, free in enumerate(sizes)]


def test_a_model_on_several_devices_is_checked_on_each(small, monkeypatch):
    settings = small.settings(gen_length=16, cache="dual")
    need = small._memory_need([40], settings)
    half = need.cache // 2 + need.denoising
    frames = []
    for sizes in ((half, half), (half, half // 2), (half // 2, half)):
        monkeypatch.setattr("vidlada.api.free_memory_of", devices_with(*sizes))
        frames.append(small.frames_that_fit([], 1, settings))
        if min(sizes) < half:
            number = sizes.index(min(sizes))
            with pytest.raises(InputError, match=f"free on cuda:{number}; use fewer"):
                small.check_frames(40, [], settings)
        else:
            small.check_frames(40, [], settings)
    assert frames[0] >= 40 > frames[1] == frames[2]


def test_which_devices_a_model_lies_on(monkeypatch):
    first, second, unknown = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("meta")
    sizes = {first: 5, second: 7, unknown: None}
    monkeypatch.setattr("vidlada.model.free_memory.free_memory", sizes.get)
    model = SimpleNamespace(devices=[first, second, second, unknown], processes=1)
    assert free_memory_of(model) == [DeviceMemory(first, 0.25, 5), DeviceMemory(second, 0.5, 7)]


def test_many_questions_are_embedded_as_there_is_room(small, free, monkeypatch):
    options = {"gen_length": 16, "block_length": 8, "cache": "dual"}
    questions = [(None, "is it red ?")] * 8
    expected = [answer.token_ids for answer in small.ask_many(questions, **options)]
    made, seen, entry, step = [], [], Conversation.entry, Denoiser.step
    monkeypatch.setattr(Conversation, "entry", lambda *given: made.append(1) or entry(*given))
    monkeypatch.setattr(Denoiser, "step", lambda self: seen.append((len(made), len(self.rows))) or step(self))
    need = small._memory_need([], small.settings(**options))
    free(need.working)  # of a longer prompt
    found = small.ask_many(questions, **options)
    assert [answer.token_ids for answer in found] == expected
    together, running = seen[0]
    assert together == running + MOST_WAITING < len(questions)
