"""Predict what an answer takes on a GPU from its shape: arithmetic, bytes and launches, step by step of its cache.

Everything here is predicted, nothing measured. Rates are what such cards reach in others' measurements, not their data
sheets; the time of a step is the largest of its three costs, plus one wait of the host.
"""

from dataclasses import dataclass
from typing import Any

from vidlada.decoding.kv_cache import key_value_bytes
from vidlada.decoding.memory import kept_bytes, pass_bytes
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.policies.base import EVERYTHING, StepContext
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.info import GIB, PROMPT_TOKENS
from vidlada.model.config import VidLaDAConfig

KERNELS_PER_LAYER, SECONDS_PER_KERNEL = 13.5, 5e-6  # counted (`vidlada bench count`); of launching one
SECONDS_PER_WAIT = 3e-4  # proposals to the host, commit rule, ids back


@dataclass(frozen=True)
class Device:
    """What a device reaches.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second.
        products, attention: operations a second in bfloat16.
    """

    memory: float
    bandwidth: float
    products: float
    attention: float


GPUS = {
    "a100": Device(80e9, 1.7e12, 220e12, 160e12),
    "h100": Device(80e9, 2.9e12, 600e12, 400e12),
    "h200": Device(141e9, 4.3e12, 650e12, 450e12),
    "rtx4090": Device(24e9, 0.9e12, 150e12, 110e12),
}


@dataclass(frozen=True)
class StepWork:
    """Of a step of all requests together.

    Attributes:
        products, attention: operations.
        weights, keys_values: bytes read.
    """

    products: float
    attention: float
    weights: float
    keys_values: float

    def costs(self, device: Device, layers: int) -> dict[str, float]:
        """Return seconds, by what they are spent on."""
        return {
            "arithmetic": self.products / device.products + self.attention / device.attention,
            "weights": self.weights / device.bandwidth,
            "keys and values": self.keys_values / device.bandwidth,
            "launches": layers * KERNELS_PER_LAYER * SECONDS_PER_KERNEL,
        }

    def seconds(self, device: Device, layers: int) -> float:
        """Return how long the step takes."""
        costs = self.costs(device, layers)
        moved = costs["weights"] + costs["keys and values"]
        return max(costs["arithmetic"], moved, costs["launches"]) + SECONDS_PER_WAIT


def steps_of(config: VidLaDAConfig, visual: int, settings: GenerationSettings, requests: int,
             value_bytes: int = 2) -> list[StepWork]:  # fmt: skip
    """Return the work of every step of requests of one shape that run together.

    Args:
        config: of the model.
        visual: visual tokens of each.
        settings: of decoding; refreshes by measured drift are taken not to come.
        requests: how many.
        value_bytes: bytes a value.
    """
    text, policy = config.text, parse_policy(settings.cache)
    layers, width = text.num_hidden_layers, text.hidden_size
    tokens = visual + PROMPT_TOKENS + settings.gen_length
    key_value_width = text.num_key_value_heads * text.head_dim
    per_layer = width * (2 * width + 2 * key_value_width + 3 * text.intermediate_size)
    head = width * text.vocab_size
    block = settings.block_length
    found: list[StepWork] = []
    for step in range(settings.num_blocks * settings.steps_per_block):
        number, step_in_block = divmod(step, settings.steps_per_block)
        after = settings.gen_length - (number + 1) * block
        sizes = {"text": PROMPT_TOKENS, "visual": visual, "before": number * block, "block": block, "after": after,
                 "undecided": settings.gen_length - step}  # fmt: skip
        start, narrow = dict(EVERYTHING), None
        if policy is not None:
            plan = policy.plan(StepContext(step, step_in_block, layers))
            start, narrow = (plan.start if step else start), plan.narrow
        active = [sum(sizes[name] for name, first in start.items() if first <= layer) for layer in range(layers)]
        if narrow is not None:
            active[1:] = [max(1, round(narrow * settings.gen_length))] * (layers - 1)
        found.append(
            StepWork(
                requests * 2.0 * (per_layer * sum(active) + block * head),
                requests * 4.0 * sum(active) * tokens * width,
                value_bytes * (per_layer * layers + head),
                requests * key_value_bytes(text, tokens, value_bytes),
            )
        )
    return found


def plan_figures(
    config: VidLaDAConfig, parameters: int, gpu: str, frames: int, concurrency: int, settings: GenerationSettings,
    questions_per_hour: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Predict memory, latency and throughput of a model on a GPU, in bfloat16.

    Args:
        config, parameters: of the model.
        gpu: a key of `GPUS`.
        frames: of every video.
        concurrency: answers decoded together.
        settings: of decoding.
        questions_per_hour: to be answered by a fleet.

    Raises:
        InputError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}; use {', '.join(GPUS)}")
    device, text = GPUS[gpu], config.text
    visual = config.visual_tokens(frames)
    tokens = visual + PROMPT_TOKENS + settings.gen_length
    each = kept_bytes(text, tokens, visual, settings, 2)
    fixed = 2 * parameters + pass_bytes(text, tokens, settings.block_length, 2)
    room = int((device.memory - fixed) // each) if each else concurrency
    together = min(concurrency, max(1, room))
    alone, batch = (steps_of(config, visual, settings, count) for count in (1, together))
    layers = text.num_hidden_layers
    latency, total = (sum(step.seconds(device, layers) for step in steps) for steps in (alone, batch))
    spent: dict[str, float] = {}
    for step in batch:
        costs = step.costs(device, layers)
        largest = max(costs, key=lambda name: costs[name])
        spent[largest] = spent.get(largest, 0.0) + step.seconds(device, layers)
    an_hour = 3600 * together / total
    fits = room >= 1
    if not fits:
        advice = "one answer does not fit on one card: fewer frames, smaller weights, or tensor parallelism"
    elif together < concurrency:
        advice = f"memory holds {together} answers of {concurrency}: one model on each of several cards"
    else:
        advice = "it fits on one card; for more questions put a model on each of several cards, not one over several"
    return {
        "gpu": gpu, "frames": frames, "tokens": tokens, "cache": settings.to_dict()["cache"],
        "gen_length": settings.gen_length, "steps": len(alone), "concurrency": together,
        "weights_gib": 2 * parameters / GIB, "request_gib": each / GIB, "total_gib": (fixed + together * each) / GIB,
        "fits": fits, "first_step_s": alone[0].seconds(device, layers), "cached_step_s":
        sorted(step.seconds(device, layers) for step in alone)[len(alone) // 2], "latency_s": latency,
        "tokens_per_second_alone": settings.gen_length / latency, "batch_s": total,
        "tokens_per_second": together * settings.gen_length / total, "questions_per_hour": an_hour,
        "limited_by": max(spent, key=lambda name: spent[name]), "advice": advice,
        "gpus": None if questions_per_hour is None else -int(-questions_per_hour // an_hour),
    }  # fmt: skip


def plan_text(figures: dict[str, Any]) -> str:
    """Return the figures as lines, each marked as predicted."""
    rows = [
        ("memory", f"{figures['total_gib']:.1f} GiB: weights {figures['weights_gib']:.1f}, "
                   f"each answer {figures['request_gib']:.2f}"),
        ("first step, cached step", f"{figures['first_step_s']:.3f} s, {1000 * figures['cached_step_s']:.1f} ms"),
        ("one answer alone", f"{figures['latency_s']:.2f} s, {figures['tokens_per_second_alone']:.0f} tokens/s"),
        (f"{figures['concurrency']} answers together", f"{figures['batch_s']:.2f} s, "
         f"{figures['tokens_per_second']:.0f} tokens/s, {figures['questions_per_hour']:.0f} questions an hour"),
        ("most time goes to", figures["limited_by"]),
    ]  # fmt: skip
    if figures["gpus"] is not None:
        rows.append(("GPUs for the questions", str(figures["gpus"])))
    head = (
        f"Predicted, not measured, without reading the video: {figures['gpu']}, bfloat16, {figures['frames']} frames, "
        f"{figures['tokens']} tokens, cache {figures['cache']}, {figures['gen_length']} slots, {figures['steps']} steps"
    )
    return "\n".join([head, *(f"- {name}: {value} (predicted)" for name, value in rows), figures["advice"]])
