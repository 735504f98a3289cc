"""Runs that cannot fit are refused before they start, with what to do."""

import numpy as np
import pytest
import torch

import vidlada
from vidlada import info
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDAConfig

DEVICE = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free."""
    return lambda size: monkeypatch.setattr(info, "free_memory", lambda device: size)


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
