"""The denoising loop against answers recorded from the published code, token by token."""

import numpy as np
import pytest
import torch
from vectors import VARIANTS, arrays, load_reference_model

from vidlada.decoding.sampler import Request, denoise
from vidlada.generation import GenerationSettings


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def decode(variant, settings, **arguments):
    """Final state and ids of one request about the recorded prompt."""
    prompt = torch.from_numpy(arrays(variant)["splice.embeds"])[0]
    request = Request(prompt, GenerationSettings(gen_length=32).replace(**settings), **arguments)
    *_, (_, state) = denoise(load_reference_model(variant), [request])
    return state


@pytest.mark.parametrize(
    ("block_length", "steps"),
    [tuple(int(part[5:]) for part in name.removeprefix("generate.").split("_"))
     for name in arrays("mha") if name.startswith("generate.block")],
)  # fmt: skip
def test_blocks_and_steps(variant, block_length, steps):
    state = decode(variant, {"block_length": block_length, "steps": steps})
    assert state.answer_ids() == arrays(variant)[f"generate.block{block_length}_steps{steps}"].reshape(-1).tolist()
    assert state.done
    assert state.statistics.steps == steps
    assert state.statistics.tokens == 32


def test_classifier_free_guidance(variant):
    state = decode(variant, {"block_length": 16, "steps": 16, "cfg_scale": 1.0})
    assert state.answer_ids() == arrays(variant)["generate.cfg1"].reshape(-1).tolist()
    assert state.statistics.forward_passes == 2 * state.statistics.steps


def test_stop_sequence(variant):
    token = int(arrays(variant)["generate.stop_token"].reshape(-1)[0])
    state = decode(variant, {"block_length": 8, "steps": 32}, stop_sequences=[(token,)])
    assert state.answer_ids() == arrays(variant)["generate.stop"].reshape(-1).tolist()
    assert state.stop_at == len(state.answer_ids())


def test_suffix(variant):
    suffix = arrays(variant)["generate.suffix_ids"].reshape(-1).tolist()
    state = decode(variant, {"block_length": 16, "steps": 16}, suffix_ids=suffix)
    assert [*state.answer_ids(), *suffix] == arrays(variant)["generate.suffix"].reshape(-1).tolist()


def test_infilling(variant):
    model = load_reference_model(variant)
    known = arrays(variant)["generate.infill_ids"].reshape(-1).tolist()
    initial = known if len(known) == 32 else [*known, *[model.config.mask_token_id] * (32 - len(known))]
    state = decode(variant, {"block_length": 32, "steps": 16}, initial_ids=initial)
    assert state.answer_ids() == arrays(variant)["generate.infill"].reshape(-1).tolist()


def test_two_token_answer_of_the_published_evaluations(variant):
    state = decode(variant, {"gen_length": 2, "block_length": 2, "steps": 2})
    assert np.array_equal(state.answer_ids(), arrays(variant)["generate.eval2"].reshape(-1))
