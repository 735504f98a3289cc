"""What this machine reaches at the products, the attention and the steps of a model's shape: measured in seconds, for
predictions (`vidlada.bench.roofline`)."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vidlada.bench.devices import Device
from vidlada.bench.sizes import random_model, random_request
from vidlada.decoding.policies.blockwise import Frozen
from vidlada.decoding.sampler import denoise
from vidlada.generation import GenerationSettings
from vidlada.machine import MEBI, free_memory, now
from vidlada.model.config import VidLaDATextConfig

BEYOND_CACHES = 256 * MEBI  # of weights or keys, so that they come from memory as in a pass
FEW, MANY = 32, 1024  # positions of a cached step and of a full one
KEYS = 4096
REPEATS = 5
LAYERS = 2  # of a pass over many positions, which arithmetic limits wherever its bytes come from
# As few operations on values as possible: what is left of a step is what the host does for it
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2}  # fmt: skip


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return the median time of a few runs, after one that is not counted."""
    run()
    found = []
    for _ in range(REPEATS):
        started = now(device)
        run()
        found.append(now(device) - started)
    return statistics.median(found)


def products_rate(text: VidLaDATextConfig, rows: int, device: str, dtype: torch.dtype) -> float:
    """Return the operations a second of a layer's packed products of so many rows."""
    width, key_value_width = text.hidden_size, text.num_key_value_heads * text.head_dim
    shapes = [
        (width + 2 * key_value_width, width), (width, width), (2 * text.intermediate_size, width),
        (width, text.intermediate_size),
    ]  # fmt: skip
    size = sum(out * inner for out, inner in shapes)
    most = LAYERS if rows >= MANY else text.num_hidden_layers
    layers = max(1, min(most, BEYOND_CACHES // (size * dtype.itemsize)))
    kind: Any = {"device": device, "dtype": dtype}
    weights = [[torch.randn(shape, **kind) * 0.02 for shape in shapes] for _ in range(layers)]
    inputs = {inner: torch.randn(rows, inner, **kind) for _, inner in shapes}

    def run() -> None:
        for layer in weights:
            for weight in layer:
                F.linear(inputs[weight.shape[1]], weight)

    return 2.0 * rows * size * layers / seconds_of(run, device)


def attention_rate(text: VidLaDATextConfig, queries: int, keys: int, device: str, dtype: torch.dtype) -> float:
    """Return the operations a second of attention of so many queries to so many keys."""
    kind: Any = {"device": device, "dtype": dtype}
    size = 2 * keys * text.num_key_value_heads * text.head_dim * dtype.itemsize
    layers = max(1, min(LAYERS if queries >= MANY else text.num_hidden_layers, BEYOND_CACHES // size))
    asking = torch.randn(1, text.num_attention_heads, queries, text.head_dim, **kind)
    states = torch.randn(layers, 2, 1, text.num_key_value_heads, keys, text.head_dim, **kind)
    grouped = text.num_attention_heads != text.num_key_value_heads

    def run() -> None:
        for own, values in states:
            F.scaled_dot_product_attention(asking, own, values, enable_gqa=grouped)

    return 4.0 * queries * keys * text.hidden_size * layers / seconds_of(run, device)


def bandwidth(device: str, dtype: torch.dtype) -> float:
    """Return the bytes a second that an element-wise operation reads and writes."""
    values = torch.ones(BEYOND_CACHES // 4 // dtype.itemsize, device=device, dtype=dtype)
    return 2.0 * values.nbytes / seconds_of(lambda: values.mul_(1.0), device)


def host_seconds(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return what the host takes for a layer of a cached step, and for a step besides, however large the model is."""
    few, many = 2, 10
    found = []
    for layers in (few, many):
        model = random_model({**TINY, "num_hidden_layers": layers}, device, dtype)
        model.language_model.pack()
        settings = GenerationSettings(gen_length=32, block_length=32, cache=Frozen.name)
        steps: list[float] = []
        for _ in range(3):
            request = random_request(model, 4, 4, settings)
            before = now(device)
            for _ in denoise(model, [request]):
                steps.append(now(device) - before)
                before = now(device)
        found.append(statistics.median(steps))
    per_layer = max(0.0, (found[1] - found[0]) / (many - few))
    return per_layer, max(0.0, found[0] - few * per_layer)


@torch.inference_mode()
def calibrate(text: VidLaDATextConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Device:
    """Measure what predictions for a model's shape need, in a few seconds.

    Args:
        text: of the language model.
        device, dtype: where and in which type it is to run.
    """
    on_cpu = torch.device(device).type == "cpu"
    per_layer, per_step = host_seconds(device, dtype)
    return Device(
        memory=float(free_memory(torch.device(device)) or 0),
        bandwidth=bandwidth(device, dtype),
        products=products_rate(text, MANY, device, dtype),
        attention=attention_rate(text, MANY, KEYS, device, dtype),
        few_products=products_rate(text, FEW, device, dtype) if on_cpu else None,
        few_attention=attention_rate(text, FEW, KEYS, device, dtype) if on_cpu else None,
        per_layer=per_layer,
        per_step=per_step,
        overlapped=not on_cpu,
        value_bytes=dtype.itemsize,
    )
