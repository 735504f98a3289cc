"""Decoding with every cache, against recomputing everything in each step.

Random weights of a given shape: they cost what trained ones cost. Their answers are meaningless, so agreement with
full recompute is reported for what it is, and quality is measured elsewhere, on the shipped model.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidlada.config import GenerationSettings, VidLaDAConfig
from vidlada.decoding.policies import policy_from
from vidlada.decoding.sampler import Denoiser, Request, State, denoise
from vidlada.errors import InputError
from vidlada.model import VidLaDAForMaskedDiffusion

TEXT_TOKENS = 32  # on either side of the video
BASELINE = "none"
CACHES = (
    BASELINE, "prefix", "dual", "interval", "sparse", "frozen", "mars", "mars:anchors=0", "mars:window=-1",
    "mars:ratio=1", "mars:ratio=4", "mars:ratio=8", "mars:pyramid=1",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Shape of a model and of its input.

    Attributes:
        text_config: of the language model.
        tokens_per_frame: visual tokens of a frame.
        frames: of the video, by default.
    """

    text_config: dict[str, Any]
    tokens_per_frame: int
    frames: int


SIZES = {
    "mid": Size(
        {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8},
        tokens_per_frame=200, frames=30,
    ),
    "8b": Size({}, tokens_per_frame=210, frames=64),
}  # fmt: skip


def random_model(size: Size, device: str, dtype: torch.dtype) -> VidLaDAForMaskedDiffusion:
    """A model of a size without its visual half."""
    text = {**VidLaDAConfig().text_config.to_dict(), **size.text_config}  # type: ignore[union-attr]
    special = {"mask_token_id": 0, "suppressed_token_ids": (), "stop_token_ids": ()}
    config = VidLaDAConfig(text_config=text, text_only=True, **special)
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return VidLaDAForMaskedDiffusion(config).eval()
        finally:
            torch.set_default_dtype(previous)


def random_request(model: VidLaDAForMaskedDiffusion, size: Size, frames: int, settings: GenerationSettings) -> Request:
    """A prompt of text, frames and text, as large as a real one's."""
    frame_index = [-1] * TEXT_TOKENS + [n for n in range(frames) for _ in range(size.tokens_per_frame)]
    frame_index += [-1] * TEXT_TOKENS
    generator = torch.Generator().manual_seed(1)
    width = model.language_model.config.hidden_size
    prompt = torch.randn(len(frame_index), width, generator=generator) * model.config.text_config.initializer_range  # type: ignore[union-attr]
    weight = model.language_model.embed_tokens.weight
    return Request(prompt.to(weight.device, weight.dtype), settings, frame_index=frame_index)


def measure(model: VidLaDAForMaskedDiffusion, request: Request) -> tuple[State, dict[str, float]]:
    """Decode once.

    Returns:
        The final state, and seconds of the whole, of the first step, and the median of the later ones.
    """
    device = request.prompt.device.type
    stamps, states = [_now(device)], []
    for _, state in denoise(model, [request]):
        states.append(state)
        stamps.append(_now(device))
    steps = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    later = steps[1:] or steps
    return states[-1], {"total": sum(steps), "first": steps[0], "later": statistics.median(later)}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def decoding_figures(
    size_name: str,
    frames: int | None = None,
    caches: Sequence[str] = CACHES,
    gen_length: int = 64,
    block_length: int = 32,
    steps: int | None = None,
    repeats: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Decode the same request with every cache, interleaved.

    Args:
        size_name: key of `SIZES`.
        frames: of the video; the size's own by default.
        caches: policies as `GenerationSettings.cache` takes them; full recompute is always measured first.
        gen_length, block_length, steps: of the answer; one token a step by default.
        repeats: of every cache.
        device, dtype: where and in which type to run.
        progress: called with what is measured next.

    Raises:
        InputError: an unknown size or a policy that does not fit.
    """
    if size_name not in SIZES:
        raise InputError(f"unknown size {size_name!r}; use {', '.join(SIZES)}")
    size = SIZES[size_name]
    frames = frames or size.frames
    caches = list(dict.fromkeys((BASELINE, *caches)))
    for cache in caches:
        policy_from(cache)
    settings = GenerationSettings(gen_length=gen_length, block_length=block_length, steps=steps)
    progress("making the model")
    model = random_model(size, device, dtype)
    requests = {cache: random_request(model, size, frames, settings.updated(cache=cache)) for cache in caches}
    for request in requests.values():
        Denoiser(model).add(request)  # whatever does not fit is refused before anything is measured
    seconds: dict[str, list[dict[str, float]]] = {cache: [] for cache in caches}
    states: dict[str, State] = {}
    for repeat in range(repeats):
        for cache, request in requests.items():
            progress(f"{cache}, {repeat + 1} of {repeats}")
            states[cache], taken = measure(model, request)
            seconds[cache].append(taken)
    baseline = statistics.median(taken["total"] for taken in seconds[BASELINE])
    reference = states[BASELINE].answer_ids()
    return {
        "machine": machine(device),
        "size": size_name,
        "frames": frames,
        "visual_tokens": frames * size.tokens_per_frame,
        "gen_length": gen_length,
        "block_length": block_length,
        "steps": states[BASELINE].statistics.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "caches": {
            cache: _row(states[cache], seconds[cache], baseline, reference) for cache in caches
        },
    }  # fmt: skip


def _row(
    state: State, seconds: Sequence[dict[str, float]], baseline: float, reference: Sequence[int]
) -> dict[str, Any]:
    totals = [taken["total"] for taken in seconds]
    ids = state.answer_ids()
    return {
        "total_s": statistics.median(totals),
        "least_s": min(totals),
        "most_s": max(totals),
        "first_step_s": statistics.median(taken["first"] for taken in seconds),
        "later_step_s": statistics.median(taken["later"] for taken in seconds),
        "tokens_per_second": len(ids) / statistics.median(totals),
        "times_faster": baseline / statistics.median(totals),
        "layer_tokens": list(state.statistics.layer_tokens),
        "refreshes": state.statistics.refreshes,
        "agreement": sum(a == b for a, b in zip(ids, reference, strict=True)) / len(reference),
    }


def machine(device: str) -> str:
    """Name of what computes."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def decoding_table(figures: dict[str, Any]) -> str:
    """Markdown of `decoding_figures`."""
    lines = [
        f"{figures['machine']}; size {figures['size']}, {figures['visual_tokens']} visual tokens, "
        f"{figures['gen_length']} answer tokens in {figures['steps']} steps, blocks of {figures['block_length']}, "
        f"{figures['dtype']}, {figures['repeats']} interleaved repeats",
        "",
        "| cache | total, s | range, s | first step, s | later step, s | tokens/s | times faster | tokens a layer "
        "(lowest, highest layer) | same ids, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cache, row in figures["caches"].items():
        work = row["layer_tokens"]
        cells = [
            cache, f"{row['total_s']:.2f}", f"{row['least_s']:.2f} to {row['most_s']:.2f}",
            f"{row['first_step_s']:.3f}", f"{row['later_step_s']:.4f}", f"{row['tokens_per_second']:.2f}",
            f"{row['times_faster']:.1f}", f"{work[0]:,} to {work[-1]:,}", f"{100 * row['agreement']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
