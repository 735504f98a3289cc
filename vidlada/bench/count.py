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
from vidlada.decoding.commit import commit_rule
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.decoding.static_step import GRAPHS, MULTIPLE, LayerGraphs
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.markdown import table

CACHES = ("none", "prefix", "dual", "frozen", "interval", "dllm", "dkv", "elastic", "sparse", "mars", "mars:paper",
          "mars:window=1,fused=false", "mars:drift=0.02")  # fmt: skip
# Settings of the rows: every cache, and what commit rules and sampling add.
WAYS: tuple[dict[str, Any], ...] = (
    *({"cache": cache} for cache in CACHES),
    {"cache": "mars", "commit": "credit"}, {"cache": "mars", "commit": "wino"}, {"cache": "mars", "temperature": 0.7},
)  # fmt: skip
GRAPH_STEPS = 8  # after which the usual step is replayed
STOP = ((7,), (8, 9))  # two stop sequences, as real requests have


@dataclass(frozen=True)
class Work:
    """Counts as plain numbers.

    Attributes:
        kernels, waits, uploads: how many.
        combining: further kernels, of attention over split keys.
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
    combining: int

    @classmethod
    def of(cls, counts: Counts) -> "Work":
        """Summed up."""
        return cls(
            counts.kernels.total(), counts.waits.total(), counts.uploads.total(), counts.read_written.total(),
            counts.flops, tuple(f"{where} {what} ×{number}" for (what, where), number in counts.waits.most_common()),
            counts.combining.total(),
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
    size: str = "8b", frames: int | None = None, ways: Sequence[dict[str, Any]] = WAYS, gen_length: int = 128,
    block_length: int = 32, steps: int = 40, rows: int = 1, progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Count every way to decode.

    Args:
        size, frames, gen_length, block_length, steps, rows: as of `count_work`.
        ways: of each row its cache and what other `GenerationSettings` differ from the defaults.
        progress: called with what is counted next.

    Raises:
        InputError: a setting cannot be used.
    """
    for way in ways:
        own = [name for name in ("gen_length", "block_length", "steps") if name in way]
        if own:
            raise InputError(f"{', '.join(own)} is the same in all rows; give it as an option of its own")
        settings = GenerationSettings(gen_length=gen_length, block_length=block_length).replace(**way)
        parse_policy(settings.cache)
        commit_rule(settings)
    found = []
    for way in ways:
        progress(way_text(way))
        shape: dict[str, Any] = {"frames": frames, "gen_length": gen_length, "block_length": block_length, "rows": rows}
        joined, counted = count_work(size, steps=steps, **shape, **way)
        most = max(counted[1:] or counted, key=lambda work: work.kernels)
        _, graphed = count_work(size, steps=min(steps, GRAPH_STEPS), graphs=True, **shape, **way)
        kinds = {"joining": joined, "first": counted[0], "usual": typical_step(counted), "most": most,
                 "graphs": typical_step(graphed)}  # fmt: skip
        found.append({"settings": way, **{kind: vars(work) for kind, work in kinds.items()}})
    frames = frames or SIZES[size].frames
    return {
        "size": size, "frames": frames, "visual_tokens": frames * SIZES[size].tokens_per_frame,
        "gen_length": gen_length, "block_length": block_length, "steps": steps, "requests": rows, "rows": found,
    }  # fmt: skip


def way_text(way: dict[str, Any]) -> str:
    """The cache, and the other settings behind it."""
    return ", ".join([way["cache"], *(f"{name} {value}" for name, value in way.items() if name != "cache")])


def kernels_text(work: dict[str, Any]) -> str:
    """How many, and behind a plus those that combine attention's parts."""
    return f"{work['kernels']:,}" + (f" + {work['combining']}" if work["combining"] else "")


def count_table(figures: dict[str, Any]) -> str:
    """Markdown of `count_figures`."""
    title = (
        f"Counted on a pretended GPU, nothing measured: size {figures['size']}, {figures['frames']} frames "
        f"({figures['visual_tokens']} visual tokens), {figures['gen_length']} answer slots, blocks of "
        f"{figures['block_length']}, bfloat16, {figures['requests']} requests together, the first "
        f"{figures['steps']} steps. Waits are where the host waits for the GPU. A kernel is counted for each operation "
        f"that PyTorch hands to the device, and behind a plus those by which FlashAttention combines what few queries "
        f"found in parts of the keys; not counted is what else a library launches within an operation, as for sorting. "
        f"Without values, every commit rule takes one token a step."
    )
    head = ["cache", "joining: kernels, waits", "usual step: kernels, waits", "launches with graphs", "GB", "TFLOP",
            "largest later step: kernels, waits", "TFLOP", "first step: kernels, waits", "TFLOP"]  # fmt: skip
    rows = []
    for row in figures["rows"]:
        joining, first, step, most, graphs = (row[kind] for kind in ("joining", "first", "usual", "most", "graphs"))
        pairs = [f"{kernels_text(work)}, {work['waits']}" for work in (joining, step, most, first)]
        replayed = graphs["kernels"] < step["kernels"]  # not in a step that captures, as in answers of few steps
        rows.append([
            way_text(row["settings"]), pairs[0], pairs[1], kernels_text(graphs) if replayed else "–",
            f"{step['read_written'] / 1e9:.1f}", f"{step['flops'] / 1e12:.2f}", pairs[2],
            f"{most['flops'] / 1e12:.1f}", pairs[3], f"{first['flops'] / 1e12:.1f}",
        ])  # fmt: skip
    waits = sorted({place for row in figures["rows"] for kind in ("joining", "first", "usual", "most")
                    for place in row[kind]["places"]})  # fmt: skip
    after = ["", "The host waits at:", *(f"- {place}" for place in waits)]
    if any("mars:paper" in row["settings"]["cache"] for row in figures["rows"]):
        after += [
            "",
            "`mars:paper` is counted on gathered blocks; on a GPU with Triton its chunk attention is one kernel.",
        ]
    return "\n".join([title, "", *table(head, rows), *after])
