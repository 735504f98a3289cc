"""Requests with random prompts, and their answers."""

import torch

from vidlada.decoding.sampler import Denoiser, Request
from vidlada.generation import GenerationSettings


def random_request(model, frame_index, seed=0, **changes):
    """A request whose positions belong to these frames, -1 for none; 16 slots in blocks of 8 by default."""
    width = model.config.text_config.hidden_size
    prompt = torch.randn(len(frame_index), width, generator=torch.Generator().manual_seed(seed)) * 0.2
    settings = GenerationSettings(gen_length=16, block_length=8).replace(**changes)
    return Request(prompt, settings, frame_index=frame_index)


def decode(model, *requests, static=False):
    """Last state of each request, decoded together."""
    denoiser, last = Denoiser(model, static), {}
    for each in requests:
        number, state = denoiser.add(each)
        last[number] = state
    while denoiser.rows:
        last.update(dict(denoiser.step()))
    return [last[number] for number in range(len(requests))]
