"""Predict what an answer takes on a device from its shape: arithmetic, bytes and launches, step by step of its cache.

Everything here is predicted, nothing measured. Rates of GPUs are what such cards reach in others' measurements, not
their data sheets; those of a CPU are measured on it (`vidlada.bench.calibration`). A kernel takes as long as its
arithmetic or its bytes, whichever is more; the host launches the next ones meanwhile, unless it is the device itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vidlada.bench.devices import CPU, DEVICES, GPUS, Device
from vidlada.decoding.kv_cache import FEW_QUERIES, key_value_bytes
from vidlada.decoding.memory import PROMPT_TOKENS, decoding_bytes, merged_shape
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.policies.base import EVERYTHING, StepContext
from vidlada.decoding.pruning import parse_pruning
from vidlada.decoding.small_kv import stored_bytes
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.machine import GIB
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.quantization import WEIGHT_BYTES


@dataclass(frozen=True)
class StepWork:
    """Of a step of all requests together.

    Attributes:
        products, attention: operations in layers where many positions are computed.
        few_products, few_attention: in the others.
        weights, keys_values: bytes read.
        states: bytes that element-wise operations read and write.
    """

    products: float
    attention: float
    few_products: float
    few_attention: float
    weights: float
    keys_values: float
    states: float

    @property
    def operations(self) -> float:
        """All of them."""
        return self.products + self.attention + self.few_products + self.few_attention

    def costs(self, device: Device, layers: int) -> dict[str, float]:
        """Return seconds, by what they go to: of products and of attention the larger of arithmetic and bytes."""
        products, weights = self.products / device.products, self.weights / device.bandwidth
        attention, keys_values = self.attention / device.attention, self.keys_values / device.bandwidth
        if device.few_products is None or device.few_attention is None:
            products += self.few_products / device.products
            attention += self.few_attention / device.attention
        else:  # measured with their bytes
            products, weights = max(products, weights if products else 0) + self.few_products / device.few_products, 0.0
            attention, keys_values = attention + self.few_attention / device.few_attention, 0.0
        return {
            "arithmetic": (products if products >= weights else 0.0) + (attention if attention >= keys_values else 0.0),
            "weights": weights if weights > products else 0.0,
            "keys and values": keys_values if keys_values > attention else 0.0,
            "element-wise operations": self.states / device.bandwidth,
            "launches": layers * device.per_layer,
        }

    def seconds(self, device: Device, layers: int) -> float:
        """Return how long the step takes."""
        costs = self.costs(device, layers)
        launches = costs.pop("launches")
        computing = sum(costs.values())
        return device.per_step + (max(computing, launches) if device.overlapped else computing + launches)


def model_parameters(config: VidLaDAConfig) -> int:
    """Return the number of a model's weights, from its shape alone."""
    import torch

    from vidlada.model.video_model import VidLaDAForMaskedDiffusion

    with torch.device("meta"):
        return sum(weight.numel() for weight in VidLaDAForMaskedDiffusion(config).parameters())


def layer_weights(text: VidLaDATextConfig) -> int:
    """Return the number of weights of a layer's projections."""
    width, key_value_width = text.hidden_size, text.num_key_value_heads * text.head_dim
    return width * (2 * width + 2 * key_value_width + 3 * text.intermediate_size)


def steps_of(config: VidLaDAConfig, visual: int, settings: GenerationSettings, requests: int, value_bytes: int = 2,
             text_tokens: int = PROMPT_TOKENS, weight_bytes: float | None = None) -> list[StepWork]:  # fmt: skip
    """Return the work of every step of requests of one shape that run together.

    Args:
        config: of the model.
        visual: visual tokens of each.
        settings: of decoding; refreshes by measured drift are taken not to come.
        requests: how many.
        value_bytes: bytes a value.
        text_tokens: of each prompt.
        weight_bytes: bytes a weight of the layers; as many as a value by default.
    """
    text, policy = config.text, parse_policy(settings.cache)
    layers, width = text.num_hidden_layers, text.hidden_size
    weight_bytes, pruning = weight_bytes or value_bytes, parse_pruning(settings.visual_prune)
    key_value_width = text.num_key_value_heads * text.head_dim
    kept = width * 2 * key_value_width  # weights of keys and values
    per_layer = layer_weights(text)
    head, states = width * text.vocab_size, 30 * width + 5 * text.intermediate_size  # the latter as counted
    block = settings.block_length
    found: list[StepWork] = []
    for step in range(settings.num_blocks * settings.steps_per_block):
        number, step_in_block = divmod(step, settings.steps_per_block)
        if step == 1 and pruning is not None:
            visual = pruning.count(visual)
        tokens = visual + text_tokens + settings.gen_length
        after = settings.gen_length - (number + 1) * block
        sizes = {"text": text_tokens, "visual": visual, "before": number * block, "block": block, "after": after,
                 "undecided": settings.gen_length - step}  # fmt: skip
        start, share = dict(EVERYTHING), None
        if policy is not None:
            plan = policy.plan(StepContext(step, step_in_block, layers))
            start, share = (plan.start if step else start), plan.layerwise
        active = [sum(sizes[name] for name, first in start.items() if first <= layer) for layer in range(layers)]
        if policy is not None and step and plan.narrow is not None:
            active[1:] = [max(1, round(plan.narrow * settings.gen_length))] * (layers - 1)
        if share is not None:  # a pass of its own, whose keys and values are those of all of the answer
            active = [count + max(1, int(share * settings.gen_length)) for count in active]
        # the last layer's queries are those of the positions whose states are wanted; the others leave keys and values
        asking = [*active[:-1], min(active[-1], block if policy is None else settings.gen_length)]
        products, attention = [0.0, 0.0], [0.0, 0.0]  # of layers where few positions are computed, and of the others
        for count, queries in zip(active, asking, strict=True):
            products[requests * count > FEW_QUERIES] += kept * count + (per_layer - kept) * queries
            attention[queries > FEW_QUERIES] += queries
        found.append(
            StepWork(
                requests * 2.0 * products[True],
                requests * 4.0 * attention[True] * tokens * width,
                requests * 2.0 * (products[False] + block * head),
                requests * 4.0 * attention[False] * tokens * width,
                weight_bytes * per_layer * layers + value_bytes * head,
                requests * read_bytes(text, tokens, value_bytes, settings.kv_dtype),
                requests * value_bytes * states * sum(asking),
            )
        )
    return found


def read_bytes(text: VidLaDATextConfig, tokens: int, value_bytes: int, kv_dtype: str) -> int:
    """Return the bytes that attention moves of a sequence's keys and values in a step: kept in 8 bits, they are read,
    written wide and read again."""
    wide = key_value_bytes(text, tokens, value_bytes)
    if kv_dtype == "auto":
        return wide
    layer = wide // text.num_hidden_layers  # one of them is wide at a time
    return stored_bytes(text, tokens, value_bytes, kv_dtype) - layer + 2 * wide


def plan_figures(
    config: VidLaDAConfig, parameters: int, gpu: str, frames: int, concurrency: int, settings: GenerationSettings,
    questions_per_hour: float | None = None, visual: int | None = None, device: Device | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Predict memory, latency and throughput of a model on a GPU in bfloat16, or on this CPU in float32.

    Args:
        config, parameters: of the model.
        gpu: one of `DEVICES`.
        frames: of every video.
        concurrency: answers decoded together.
        settings: of decoding.
        questions_per_hour: to be answered by a fleet.
        visual: visual tokens of a video, where the model says no more than its language model's shape.
        device: what the device reaches; a CPU's is to be measured (`vidlada.bench.calibration`).
        quantization: of the layers' weights. Products are taken to be as fast as without; only bytes become fewer.

    Raises:
        InputError: an unknown device or quantisation, a quantisation on a CPU, where its rates are not measured, more
            tokens than the model has positions, or a number of questions that is none.
    """
    text = config.text
    if questions_per_hour is not None and not 0 < questions_per_hour < math.inf:
        raise InputError(f"questions_per_hour must be a number above 0, not {questions_per_hour}")
    if gpu not in DEVICES:
        raise InputError(f"unknown device {gpu!r}; use {', '.join(DEVICES)}")
    if device is None and gpu == CPU:
        raise InputError("what this CPU reaches is to be measured first; see vidlada.bench.calibration")
    if quantization is not None and (gpu == CPU or quantization not in WEIGHT_BYTES):
        raise InputError(f"no prediction for quantize {quantization} on {gpu}; use a GPU and {', '.join(WEIGHT_BYTES)}")
    device = device or GPUS[gpu]
    size = device.value_bytes
    weight_bytes = size if quantization is None else WEIGHT_BYTES[quantization]
    visual = config.visual_tokens(frames) if visual is None else visual
    shape = tokens, visual, _ = merged_shape(visual + PROMPT_TOKENS + settings.gen_length, visual, settings)
    if tokens > config.max_length:
        raise InputError(
            f"{frames} frames and {settings.gen_length} slots take {tokens} tokens, more than the model's "
            f"{config.max_length}; use fewer frames, or visual_keep"
        )
    each = decoding_bytes(text, [shape], size)
    weights = size * parameters - (size - weight_bytes) * text.num_hidden_layers * layer_weights(text)
    room = int((device.memory - weights) // each.peak)
    heads = text.num_key_value_heads
    divisors = (count for count in range(1, heads + 1) if heads % count == 0)
    cards = next((count for count in divisors if (weights + each.peak) / count <= device.memory), None)
    together = min(concurrency, max(1, room))
    alone, batch = (
        steps_of(config, visual, settings, count, size, weight_bytes=weight_bytes) for count in (1, together)
    )
    layers = text.num_hidden_layers
    latency, total = (sum(step.seconds(device, layers) for step in steps) for steps in (alone, batch))
    an_hour = 3600 * together / total
    return {
        "gpu": gpu, "value_bytes": size, "frames": frames, "tokens": tokens, "cache": settings.to_dict()["cache"],
        "gen_length": settings.gen_length, "steps": len(alone), "concurrency": together,
        "quantization": quantization, "kv_dtype": settings.kv_dtype,
        "weights_gib": weights / GIB, "request_gib": each.kept / GIB, "working_gib": each.working / GIB,
        "total_gib": (weights + together * each.peak) / GIB,
        "fits": room >= 1, "first_step_s": alone[0].seconds(device, layers), "cached_step_s":
        sorted(step.seconds(device, layers) for step in alone)[len(alone) // 2], "latency_s": latency,
        "tokens_per_second_alone": settings.gen_length / latency, "batch_s": total,
        "tokens_per_second": together * settings.gen_length / total, "questions_per_hour": an_hour,
        "limited_by": bottleneck(batch, device, layers), "advice": advice(room, concurrency, cards),
        "gpus": None if questions_per_hour is None or room < 1 else -int(-questions_per_hour // an_hour),
    }  # fmt: skip


def bottleneck(steps: Sequence[StepWork], device: Device, layers: int) -> str:
    """Return the kind of cost that most of the steps' time goes to."""
    spent: dict[str, float] = {}
    for step in steps:
        costs = step.costs(device, layers)
        largest = max(costs, key=lambda name: costs[name])
        spent[largest] = spent.get(largest, 0.0) + step.seconds(device, layers)
    return max(spent, key=lambda name: spent[name])


def advice(room: int, concurrency: int, cards: int | None) -> str:
    """Return how to place the model.

    Args:
        room: answers that the memory of one device has room for.
        concurrency: answers that are to be decoded together.
        cards: devices that one answer needs, where they divide the model's heads; None where no number is enough.
    """
    if room < 1:
        divided = "" if cards is None else f", or tensor parallelism over {cards} devices"
        return f"one answer does not fit on one device: fewer frames, smaller weights{divided}"
    if room < concurrency:
        return f"memory holds {room} answers of {concurrency}: one model on each of several devices"
    return "it fits on one device; for more questions put a model on each of several, not one over several"


def plan_text(figures: dict[str, Any]) -> str:
    """Return the figures as lines, each marked as predicted."""
    rows = [
        ("memory", f"{figures['total_gib']:.1f} GiB: weights {figures['weights_gib']:.1f}, "
                   f"each answer {figures['request_gib']:.2f}, and {figures['working_gib']:.2f} in its first step"),
        ("first step, cached step", f"{figures['first_step_s']:.3f} s, {1000 * figures['cached_step_s']:.1f} ms"),
        ("one answer alone", f"{figures['latency_s']:.2f} s, {figures['tokens_per_second_alone']:.0f} tokens/s"),
        (f"batch of {figures['concurrency']}", f"{figures['batch_s']:.2f} s, "
         f"{figures['tokens_per_second']:.0f} tokens/s, {figures['questions_per_hour']:.0f} questions an hour"),
        ("most time goes to", figures["limited_by"]),
    ]  # fmt: skip
    if figures["gpus"] is not None:
        rows.append(("devices for the questions", str(figures["gpus"])))
    kind = "bfloat16" if figures["value_bytes"] == 2 else "float32"
    head = (
        f"Predicted, not measured, without reading the video: {figures['gpu']}, {kind}, {figures['frames']} frames, "
        f"{figures['tokens']} tokens, cache {figures['cache']}, {figures['gen_length']} slots, {figures['steps']} steps"
    )
    return "\n".join([head, *(f"- {name}: {value} (predicted)" for name, value in rows), figures["advice"]])
