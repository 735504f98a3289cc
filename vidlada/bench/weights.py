"""Steps with weights kept in 8 bits, in bfloat16, or run by compiled layers, beside float32."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidlada.bench.decoding import Run, measure
from vidlada.bench.sizes import subject
from vidlada.decoding.policies.blockwise import Frozen
from vidlada.generation import GenerationSettings
from vidlada.machine import machine
from vidlada.markdown import table
from vidlada.model.quantization import Quantization, quantize


@dataclass(frozen=True)
class Weights:
    """How weights are kept and run."""

    dtype: str
    quantization: Quantization | None = None
    compiled: bool = False

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.dtype, self.quantization, "compiled" if self.compiled else "")))


WEIGHTS = (
    Weights("float32"), Weights("float32", "int8"), Weights("float32", "int8-dynamic"), Weights("float32", None, True),
    Weights("bfloat16"), Weights("bfloat16", "int8"), Weights("bfloat16", "int8-dynamic"),
    Weights("bfloat16", "float8"), Weights("bfloat16", "int4"), Weights("bfloat16", None, True),
    Weights("bfloat16", "int8", True),
)  # fmt: skip


def weights_figures(
    size: str, frames: int | None = None, kinds: Sequence[Weights] = WEIGHTS, repeats: int = 3, device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """A full step and a cached one (a block of 32 answer tokens) with weights kept in several ways.

    One after another, not interleaved: at the size of 8b several models do not fit together.

    Args:
        size, frames, device: as in `vidlada.bench.decoding.decoding_figures`.
        kinds: the first is what the others are compared with.
        repeats: of each, after one that is not counted.
        progress: called with what is measured next.

    Raises:
        InputError: an unknown size, or torchao is missing.
    """
    settings = GenerationSettings(gen_length=32, block_length=32, cache=Frozen.name)
    visual_tokens, runs = 0, dict[Weights, list[Run]]()
    for kind in kinds:
        progress(f"{kind}, warming up")
        made = subject(size, frames, device, getattr(torch, kind.dtype))
        if kind.quantization is not None:
            quantize(made.model.language_model.layers, kind.quantization)
        if kind.compiled:
            made.model.language_model.compile_layers()
        measure(made.model, made.request(settings))
        visual_tokens, runs[kind] = made.visual_tokens, []
        for repeat in range(repeats):
            progress(f"{kind}, {repeat + 1} of {repeats}")
            runs[kind].append(measure(made.model, made.request(settings)))
        del made
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    full = {kind: statistics.median(run.seconds[0] for run in own) for kind, own in runs.items()}
    cached = {kind: statistics.median(statistics.median(run.seconds[1:]) for run in own) for kind, own in runs.items()}
    return {
        "machine": machine(device), "size": size, "visual_tokens": visual_tokens, "repeats": repeats,
        "rows": [
            {"weights": str(kind), "full_step_s": full[kind], "cached_step_s": cached[kind],
             "full_times_faster": full[kinds[0]] / full[kind], "cached_times_faster": cached[kinds[0]] / cached[kind]}
            for kind in kinds
        ],
    }  # fmt: skip


def weights_table(figures: dict[str, Any]) -> str:
    """Markdown of `weights_figures`."""
    title = (
        f"{figures['machine']}; size {figures['size']}, {figures['visual_tokens']} visual tokens, 32 answer tokens, "
        f"{figures['repeats']} repeats"
    )
    head = ("weights", "full step, s", "cached step, s", "full step, times faster", "cached step, times faster")
    rows = [
        [row["weights"], f"{row['full_step_s']:.3f}", f"{row['cached_step_s']:.4f}",
         f"{row['full_times_faster']:.2f}", f"{row['cached_times_faster']:.2f}"]
        for row in figures["rows"]
    ]  # fmt: skip
    return "\n".join([title, "", *table(head, rows)])
