"""Heads with a purpose: the frame before, and the frame a question names."""

import pytest
import torch

from trainings import MODEL

from vidlada.errors import InputError
from vidlada.model.language_model import rotary_angles, rotate
from vidlada.training import heads
from vidlada.training.config import NewHeads
from vidlada.training.models import new_model

WIDTH, HEAD_DIM, THETA = 64, 48, 10000.0


def attention(states: torch.Tensor, maps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(tokens, tokens) attention of one head over (tokens, width) states."""
    rotation = rotary_angles(torch.arange(len(states))[None], HEAD_DIM, THETA, torch.float32)
    query, key = (rotate((states @ part.T)[None, None], rotation)[0, 0] for part in maps)
    return (query @ key.T / HEAD_DIM**0.5).softmax(-1)


def seen_by(states: torch.Tensor, visual: torch.Tensor, named: torch.Tensor, shown: torch.Tensor) -> heads.Seen:
    return heads.Seen(states, visual, named, shown, torch.zeros(4))


def test_a_visual_token_attends_to_its_place_in_the_frame_before():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(400, WIDTH, generator=generator)
    visual = torch.arange(400) < 300
    states[:, 0] = visual.float()  # as their embeddings differ from those of words
    none = torch.full((400,), -1)
    maps = heads.fit_distance(seen_by(states, visual, none, none), 12, heads.rotary_frequencies(HEAD_DIM, THETA))
    places = torch.arange(12, 300)
    assert attention(states, maps)[places, places - 12].mean() > 0.8


def test_a_number_attends_to_the_frame_whose_clock_shows_it(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    words, clocks = torch.randn(2, 20, WIDTH, generator=generator)

    def clip(first: int, asked: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eight frames of five tokens, then four words, one of them a number."""
        states = torch.randn(44, WIDTH, generator=generator) * 0.3
        shown, named = torch.full((44,), -1), torch.full((44,), -1)
        shown[:40:5] = torch.arange(first, first + 8)
        named[42] = asked
        states[:40:5] += clocks[first : first + 8]
        states[42] += words[asked]
        return states, named, shown

    clips = [clip(first, first + place) for first in range(12) for place in range(8) for _ in range(3)]
    states, named, shown = (torch.cat(part) for part in zip(*clips, strict=True))
    frequencies = heads.rotary_frequencies(HEAD_DIM, THETA)
    monkeypatch.setattr(heads, "FIT_STEPS", 200)
    maps = heads.fit_lookup(seen_by(states, shown >= 0, named, shown), frequencies, HEAD_DIM**-0.5)
    right = []
    for first, asked in ((0, 3), (4, 11), (9, 9), (11, 18)):
        states, _, shown = clip(first, asked)
        right.append(attention(states, maps)[42][shown == asked].sum())
    assert torch.stack(right).mean() > 0.8


def test_new_heads_add_nothing_until_they_are_trained(monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 2)
    monkeypatch.setattr(heads, "FIT_STEPS", 20)
    model, processor = new_model(MODEL, 0)
    layer = model.language_model.layers[1].self_attn
    before = {name: value.clone() for name, value in layer.named_parameters()}
    heads.add_heads(model, processor, NewHeads(previous_frame=(1,), seconds=(1,)))
    size = layer.head_dim
    replaced = [
        h
        for h in range(len(before["o_proj.weight"]) // size)
        if not layer.o_proj.weight[:, h * size : (h + 1) * size].any()
    ]
    assert len(replaced) == 2
    for name, value in layer.named_parameters():
        kept = torch.ones(len(value), dtype=torch.bool)
        for head in replaced:
            kept[head * size : (head + 1) * size] = False
        if name == "o_proj.weight":
            torch.testing.assert_close(value[:, kept], before[name][:, kept])
        else:
            torch.testing.assert_close(value[kept], before[name][kept])
            assert value[~kept].ne(before[name][~kept]).any(1).sum() > 0
    layer.zero_grad()
    model(input_ids=torch.randint(7, 40, (2, 9))).logits.square().sum().backward()
    assert all(layer.o_proj.weight.grad[:, head * size : (head + 1) * size].any() for head in replaced)


def test_a_layer_that_is_not_there_gets_no_head():
    model, processor = new_model(MODEL, 0)
    with pytest.raises(InputError, match="layers are 0 to 1"):
        heads.add_heads(model, processor, NewHeads(seconds=(2,)))
