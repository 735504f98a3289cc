"""8-bit weights and compiled layers: near the model they come from, and the same in a batch as alone."""

import copy
import shutil

import pytest
import torch

import vidlada
from vidlada.bench.sizes import SIZES, random_model, random_request
from vidlada.decoding.sampler import denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.quantization import quantize

SETTINGS = GenerationSettings(gen_length=4, block_length=4, cache="frozen")


@pytest.fixture(scope="module")
def model():
    return random_model({**SIZES["mid"].text_config, "num_hidden_layers": 2}, "cpu", torch.float32)


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.03), ("int8-dynamic", 0.06)])
def test_states_stay_near(model, kind, tolerance):
    smaller = copy.deepcopy(model)
    quantize(smaller.language_model, kind)
    states = random_request(model, 20, 2, SETTINGS).prompt[None]
    with torch.inference_mode():
        expected, found = model.language_model(states), smaller.language_model(states)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    weight = smaller.language_model.layers[0].mlp.up_proj.weight
    assert weight.numel() * 1.2 > sum(part.nbytes for part in _parts(weight))


def _parts(weight):
    """Plain tensors inside a quantised one."""
    names, _ = weight.__tensor_flatten__()
    for name in names:
        part = getattr(weight, name)
        yield from _parts(part) if hasattr(part, "__tensor_flatten__") else [part]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_answer_the_same(model):
    request = random_request(model, 5, 3, SETTINGS)
    *_, (_, plain) = denoise(model, [request])
    compiled = copy.deepcopy(model)
    compiled.language_model.compile_layers()
    *_, (_, found) = denoise(compiled, [request])
    assert torch.equal(found.proposed, plain.proposed)


def test_an_unknown_quantisation(small_folder):
    with pytest.raises(InputError, match="unknown quantisation 'int3'; use int8 or int8-dynamic"):
        vidlada.load(small_folder, quantization="int3")
