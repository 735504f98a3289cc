"""Smaller weights and compiled layers: near the model they come from, and never whole while they are loaded."""

import copy
import gc
import itertools
import shutil
from typing import get_args

import pytest
import torch
from conftest import SMALL

import vidlada
from vidlada import loading
from vidlada.bench.sizes import SIZES, random_model, random_request
from vidlada.checkpoint.load import describe, save_model
from vidlada.cli.options import model_option
from vidlada.decoding.sampler import denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.info import check_memory_of_weights
from vidlada.model.quantization import WEIGHT_BYTES, Quantization, check_quantization, quantize, torchao_config
from vidlada.training.models import new_model

SETTINGS = GenerationSettings(gen_length=4, block_length=4, cache="frozen")


@pytest.fixture(scope="module")
def model():
    return random_model({**SIZES["mid"].text_config, "num_hidden_layers": 2}, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("int8", 0.03), ("int8-dynamic", 0.06), ("float8", 0.1), ("int4", 0.4)]
)
def test_states_stay_near(model, kind, tolerance):
    smaller = copy.deepcopy(model)
    quantize(smaller.language_model.layers, kind)
    states = random_request(model, 20, 2, SETTINGS).prompt[None]
    with torch.inference_mode():
        expected, found = model.language_model(states), smaller.language_model(states)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    weight = smaller.language_model.layers[0].mlp.up_proj.weight
    assert weight.numel() * 1.2 * WEIGHT_BYTES[kind] > sum(part.nbytes for part in _parts(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "float8", "int4"])
def test_an_output_without_weights_stays_zero(kind, dtype):
    """As of a head that training has emptied, whose scale would be 0 / 0."""
    if (kind, dtype) == ("int4", torch.float16):
        pytest.skip("torchao's int4 products take no float16 on a CPU")
    linear = torch.nn.Linear(64, 16, bias=False, dtype=dtype)
    linear.weight.data[3] = 0
    quantize(linear, kind)
    with torch.inference_mode():
        found = linear(torch.randn(2, 64, dtype=dtype))
    assert found.isfinite().all()
    assert found[:, 3].abs().max() < 1e-5 < found[:, 4].abs().min()


def _parts(weight):
    """Plain tensors inside a quantised one."""
    names, _ = weight.__tensor_flatten__()
    for name in names:
        part = getattr(weight, name)
        yield from _parts(part) if hasattr(part, "__tensor_flatten__") else [part]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", [None, "int8", "float8"])
def test_compiled_layers_answer_the_same(model, kind):
    request = random_request(model, 5, 3, SETTINGS)
    compiled = copy.deepcopy(model)
    if kind is not None:
        quantize(compiled.language_model.layers, kind)
    *_, (_, plain) = denoise(compiled, [request])
    compiled.language_model.compile_layers()
    *_, (_, found) = denoise(compiled, [request])
    assert torch.equal(found.proposed, plain.proposed)
    torch.testing.assert_close(found.confidence, plain.confidence, rtol=0.02, atol=1e-6)


def test_refused_before_anything_is_loaded(small_folder):
    with pytest.raises(InputError, match="unknown quantisation 'int3'; use int8, int8-dynamic, float8, .* or int4"):
        vidlada.load(small_folder, quantization="int3")
    with pytest.raises(InputError, match="float8-dynamic multiplies in float8, which cpu cannot; use float8 or int8"):
        vidlada.load(small_folder, quantization="float8-dynamic")
    with pytest.raises(InputError, match="int4 products take bfloat16 on a GPU, not torch.float32"):
        check_quantization("int4", torch.device("cuda"), torch.float32)
    with pytest.raises(InputError, match="int4 needs widths that are multiples of 32, not 48"):
        quantize(torch.nn.Linear(48, 64, bias=False), "int4")


def test_configurations_of_a_gpu():
    """What cannot run here."""
    cuda = torch.device("cuda")
    four, eight = torchao_config("int4", cuda, 64), torchao_config("float8-dynamic", cuda)
    assert (four.group_size, four.int4_packing_format) == (64, "tile_packed_to_4d")
    assert eight.weight_dtype is eight.activation_dtype is torch.float8_e4m3fn


def test_a_gpu_that_cannot_multiply_in_float8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match="compute capability 8.9 .* not 8.0"):
        check_quantization("float8-dynamic", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_quantization("float8-dynamic", torch.device("cuda"), torch.bfloat16)


def test_the_command_line_offers_every_kind():
    command = model_option(lambda source: None)
    choices = next(each.type.choices for each in command.__click_params__ if each.name == "quantization")
    assert tuple(choices) == get_args(Quantization)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A model whose weights are mostly layers."""
    layers = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "num_key_value_heads": 4}
    model, processor = new_model({**SMALL, "text_config": {**SMALL["text_config"], **layers}}, seed=1)
    folder = tmp_path_factory.mktemp("deep") / "model"
    save_model(model, processor, folder)
    return folder


def alive():
    """Bytes of all tensors that hold memory."""
    tensors = [part for part in gc.get_objects() if type(part) in (torch.Tensor, torch.nn.Parameter)]
    places = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors if not part.is_meta
              and not hasattr(part, "__tensor_flatten__")}  # fmt: skip
    return sum(places.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "float8", "int4"])
def test_the_layers_are_never_whole_while_they_are_loaded(deep_folder, monkeypatch, kind):
    gc.collect()
    before, seen, layers = alive(), [], itertools.count(1)

    def observed(layer, kind):
        if next(layers) % 4 == 0:  # all tensors are looked for, which takes a second
            gc.collect()
            seen.append(alive() - before)
        quantize(layer, kind)

    monkeypatch.setattr(loading, "quantize", observed)
    loaded = vidlada.load(deep_folder, quantization=kind)
    monkeypatch.undo()
    assert loaded.model.config.text.num_hidden_layers == len(loaded.model.language_model.layers) == 12
    assert next(layers) == 13 and len(seen) == 3
    whole = vidlada.load(deep_folder)
    total = sum(weight.nbytes for weight in whole.model.parameters())
    layer = sum(weight.nbytes for weight in whole.model.language_model.layers[0].parameters())
    assert max(seen) < total - 11 * layer * (1 - 1.3 * WEIGHT_BYTES[kind] / 4)
    quantize(whole.model.language_model.layers, kind)
    states = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.model.language_model(states), whole.model.language_model(states))
        assert torch.equal(loaded.model.lm_head(states), whole.model.lm_head(states))


def test_an_answer_of_smaller_weights(deep_folder):
    model = vidlada.load(deep_folder, quantization="int8")
    answer = model.ask(None, "is it red ?", gen_length=8, cache="dual")
    assert answer.statistics.steps


def test_less_memory_is_asked_for(deep_folder, monkeypatch):
    needs = []
    monkeypatch.setattr("vidlada.info.check_memory", lambda need, *rest: needs.append(need))
    checkpoint = describe(deep_folder)
    for kind in (None, "int8", "int4"):
        check_memory_of_weights(checkpoint, torch.bfloat16, torch.device("cpu"), kind)
    assert needs[0] > needs[1] > needs[2] > needs[0] / 4
