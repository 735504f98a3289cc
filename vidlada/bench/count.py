"""What a step asks of a GPU: kernels, waits of the host, bytes, arithmetic. Counted, on a machine without one.

The model has its true shape and no values; see `vidlada.bench.pretend`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vidlada.bench.pretend import Counts, move, pretended_device, shape_only
from vidlada.bench.sizes import SIZES, TEXT_TOKENS, Size, random_model
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.decoding.static_step import GRAPHS, MULTIPLE, LayerGraphs
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.markdown import table

CACHES = ("none", "prefix", "dual", "frozen", "interval", "dllm", "dkv", "elastic", "sparse", "mars", "mars:paper",
          "mars:window=1,fused=false", "mars:drift=0.02")  # fmt: skip
GRAPH_STEPS = 8  # after which the usual step is replayed
STOP = ((7,), (8, 9))  # two stop sequences, as real requests have


@dataclass(frozen=True)
class Work:
    """Counts as plain numbers.

    Attributes:
        kernels, waits, uploads: how many.
        read_written: bytes.
        flops: of products and attention.
        places: of the waits, in words, with how many.
    """

    kernels: int
    waits: int
    uploads: int
    read_written: int
    flops: int
    places: tuple[str, ...]

    @classmethod
    def of(cls, counts: Counts) -> "Work":
        """Summed up."""
        return cls(
            counts.kernels.total(), counts.waits.total(), counts.uploads.total(), counts.read_written.total(),
            counts.flops, tuple(f"{where} {what} ×{number}" for (what, where), number in counts.waits.most_common()),
        )  # fmt: skip


def shape_request(width: int, tokens_per_frame: int, frames: int, settings: GenerationSettings, dtype: torch.dtype,
                  counts: Counts) -> Request:  # fmt: skip
    """A request as large as a real one, without values, on the pretended device."""
    index = [-1] * TEXT_TOKENS + [n for n in range(frames) for _ in range(tokens_per_frame)] + [-1] * TEXT_TOKENS
    prompt = shape_only(len(index), width, dtype=dtype, counts=counts)
    return Request(prompt, settings, stop_sequences=STOP, frame_index=index)


def count_work(
    size: str | Size, cache: str, frames: int | None = None, gen_length: int = 128, block_length: int = 32,
    steps: int | None = None, rows: int = 1, dtype: torch.dtype = torch.bfloat16, graphs: bool = False, **options: Any,
) -> tuple[Work, list[Work]]:  # fmt: skip
    """Count the joining of requests and their steps.

    Args:
        size: one of `vidlada.bench.sizes`, or its name.
        cache: as `GenerationSettings.cache`.
        frames: of each video; the size's own number by default.
        gen_length, block_length: of the answers.
        steps: to count; all by default.
        rows: requests that run together.
        dtype: of the weights.
        graphs: what is replayed as a CUDA graph counts as one kernel.
        options: further `GenerationSettings`.

    Returns:
        What one request needs to join, and each step.

    Raises:
        InputError: an unknown size, or settings that do not fit.
    """
    if isinstance(size, str) and size not in SIZES:
        raise InputError(f"unknown size {size!r}; use {', '.join(SIZES)}")
    shape = SIZES[size] if isinstance(size, str) else size
    settings = GenerationSettings(gen_length=gen_length, block_length=block_length, cache=cache).replace(**options)
    model = random_model(shape.text_config, "meta", dtype)
    model.config.suppressed_token_ids = (1, 2, 3, 4)
    model.language_model.pack()
    with pretended_device() as counts:
        move(model, counts)
        if graphs:
            GRAPHS[model.language_model] = LayerGraphs(MULTIPLE, partial(one_launch, counts))
        denoiser, width = Denoiser(model, graphs), model.language_model.config.hidden_size
        requests = [
            shape_request(width, shape.tokens_per_frame, frames or shape.frames, settings, dtype, counts)
            for _ in range(rows)
        ]
        counts.take()
        denoiser.add(requests[0])
        joined = Work.of(counts.take())
        for request in requests[1:]:
            denoiser.add(request)
        counts.take()
        found: list[Work] = []
        while denoiser.rows and (steps is None or len(found) < steps):
            denoiser.step()
            found.append(Work.of(counts.take()))
    return joined, found


def one_launch(counts: Counts, run: Callable[[], None]) -> Callable[[], None]:
    """A function whose kernels count as one, as if it had been captured."""

    def replay() -> None:
        before = counts.kernels.copy()
        run()
        counts.kernels = before
        counts.kernels["graph", "decoding/static_step.py"] += 1

    return replay


def typical_step(steps: Sequence[Work]) -> Work:
    """The most frequent kind of step after the first."""
    later = steps[1:] or steps
    kinds = Counter((work.kernels, work.waits) for work in later)
    (kind, _), *_ = kinds.most_common(1)
    return next(work for work in later if (work.kernels, work.waits) == kind)


def count_figures(
    size: str = "8b", frames: int | None = None, caches: Sequence[str] = CACHES, gen_length: int = 128,
    block_length: int = 32, steps: int = 40, rows: int = 1, progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Count every cache.

    Args:
        size, frames, gen_length, block_length, steps, rows: as of `count_work`.
        caches: as `GenerationSettings.cache`.
        progress: called with what is counted next.
    """
    for cache in caches:
        parse_policy(cache)
    found = []
    for cache in caches:
        progress(cache)
        joined, counted = count_work(size, cache, frames, gen_length, block_length, steps, rows)
        most = max(counted[1:] or counted, key=lambda work: work.kernels)
        _, replayed = count_work(
            size, cache, frames, gen_length, block_length, min(steps, GRAPH_STEPS), rows, graphs=True
        )
        kinds = {"joining": joined, "first": counted[0], "usual": typical_step(counted), "most": most,
                 "graphs": typical_step(replayed)}  # fmt: skip
        found.append({"cache": cache, **{kind: vars(work) for kind, work in kinds.items()}})
    frames = frames or SIZES[size].frames
    return {
        "size": size, "frames": frames, "visual_tokens": frames * SIZES[size].tokens_per_frame,
        "gen_length": gen_length, "block_length": block_length, "steps": steps, "requests": rows, "rows": found,
    }  # fmt: skip


def count_table(figures: dict[str, Any]) -> str:
    """Markdown of `count_figures`."""
    title = (
        f"Counted on a pretended GPU, nothing measured: size {figures['size']}, {figures['frames']} frames "
        f"({figures['visual_tokens']} visual tokens), {figures['gen_length']} answer slots, blocks of "
        f"{figures['block_length']}, bfloat16, {figures['requests']} requests together, the first "
        f"{figures['steps']} steps. Waits are where the host waits for the GPU."
    )
    head = ["cache", "joining: kernels, waits", "usual step: kernels, waits", "launches with graphs", "GB", "TFLOP",
            "largest later step: kernels, waits", "TFLOP", "first step: kernels, waits", "TFLOP"]  # fmt: skip
    rows = []
    for row in figures["rows"]:
        joining, first, step, most = (row[kind] for kind in ("joining", "first", "usual", "most"))
        pairs = [f"{work['kernels']:,}, {work['waits']}" for work in (joining, step, most, first)]
        rows.append([
            row["cache"], pairs[0], pairs[1], f"{row['graphs']['kernels']:,}", f"{step['read_written'] / 1e9:.1f}",
            f"{step['flops'] / 1e12:.2f}", pairs[2], f"{most['flops'] / 1e12:.1f}", pairs[3],
            f"{first['flops'] / 1e12:.1f}",
        ])  # fmt: skip
    waits = sorted({place for row in figures["rows"] for kind in ("joining", "first", "usual", "most")
                    for place in row[kind]["places"]})  # fmt: skip
    return "\n".join([title, "", *table(head, rows), "", "The host waits at:", *(f"- {place}" for place in waits)])
