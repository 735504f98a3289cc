"""Decoding with every cache, against recomputing everything in each step.

Random weights of a given shape cost what trained ones cost. Their answers are meaningless and never confident, so a
fixed number of tokens a step stands in for threshold decoding there; quality is measured on the shipped model.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidlada.bench.sizes import subject
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser, Request, State, denoise
from vidlada.generation import GenerationSettings
from vidlada.machine import GIB, machine, now, peak_memory, reset_peak_memory
from vidlada.markdown import table
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

BASELINE = "none"
CACHES = (
    BASELINE, "prefix", "dual", "interval", "dllm", "dkv", "elastic", "sparse", "frozen", "mars", "mars:paper",
    "mars:window=1", "mars:window=1,anchors=0", "mars:ratio=1", "mars:ratio=2", "mars:ratio=4", "mars:pyramid=1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A cache at a pace.

    Attributes:
        cache: as `GenerationSettings.cache`.
        pace: in words.
        settings: of decoding.
    """

    cache: str
    pace: str
    settings: GenerationSettings


@dataclass(frozen=True)
class Run:
    """One decoding.

    Attributes:
        state: the final one.
        seconds: of every step.
        first_token: seconds until the leftmost slot was final.
        peak: bytes.
    """

    state: State
    seconds: list[float]
    first_token: float
    peak: int

    @property
    def total(self) -> float:
        """Seconds of the whole."""
        return sum(self.seconds)


def cases_for(caches: Sequence[str], settings: GenerationSettings, threshold: float, tokens_per_step: int | None,
              trained: bool) -> list[Case]:  # fmt: skip
    """Every cache at one token a step and at a faster pace, full recompute first.

    Args:
        caches: as `GenerationSettings.cache`.
        settings: lengths of answer and blocks.
        threshold: of trained models' faster pace.
        tokens_per_step: of the faster pace of random models; None leaves the faster pace out.
        trained: which of them.
    """
    names = list(dict.fromkeys((BASELINE, *caches)))
    cases = [Case(cache, "1 token", settings.replace(cache=cache)) for cache in names]
    if trained:
        fast = settings.replace(threshold=threshold)
        cases += [Case(cache, f"threshold {threshold:g}", fast.replace(cache=cache)) for cache in names]
    elif tokens_per_step is not None:
        steps = settings.num_blocks * -(-settings.block_length // tokens_per_step)
        fast = settings.replace(steps=steps)
        cases += [Case(cache, f"{tokens_per_step} tokens", fast.replace(cache=cache)) for cache in names]
    return cases


def measure(model: VidLaDAForMaskedDiffusion, request: Request) -> Run:
    """Decode once."""
    device = str(request.prompt.device)
    reset_peak_memory(device)
    stamps, first_token, state = [now(device)], None, None
    for _, state in denoise(model, [request]):
        stamps.append(now(device))
        if first_token is None and (bool(state.committed[0]) or state.done):
            first_token = stamps[-1] - stamps[0]
    assert state is not None and first_token is not None
    seconds = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    return Run(state, seconds, first_token, peak_memory(device))


def decoding_figures(
    size: str,
    frames: int | None = None,
    caches: Sequence[str] = CACHES,
    gen_length: int = 64,
    block_length: int = 32,
    threshold: float = 0.9,
    tokens_per_step: int | None = 3,
    repeats: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Decode the same request with every cache, interleaved.

    Args:
        size: as `vidlada.bench.sizes.subject` takes it.
        frames: of the video; the size's own by default.
        caches: policies as `GenerationSettings.cache` takes them; full recompute is always measured first.
        gen_length, block_length: of the answer.
        threshold, tokens_per_step: of the faster pace; see `cases_for`.
        repeats: of every case.
        device, dtype: where and in which type to run.
        progress: called with what is measured next.

    Raises:
        InputError: an unknown size or a policy that does not fit.
    """
    for cache in caches:
        parse_policy(cache)
    settings = GenerationSettings(gen_length=gen_length, block_length=block_length)
    progress("making the model")
    measured = subject(size, frames, device, dtype)
    cases = cases_for(caches, settings, threshold, tokens_per_step, measured.trained)
    for case in cases:
        Denoiser(measured.model).add(measured.request(case.settings))  # what does not fit is refused before all else
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    if device.startswith("cuda"):  # the first run pays for libraries, plans of kernels and captured graphs
        for case in cases:
            progress(f"{case.cache}, {case.pace} a step, warming up")
            measure(measured.model, measured.request(case.settings))
    for repeat in range(repeats):
        for case in cases:
            progress(f"{case.cache}, {case.pace} a step, {repeat + 1} of {repeats}")
            runs[case].append(measure(measured.model, measured.request(case.settings)))
    return {
        "machine": machine(device),
        "size": size,
        "frames": measured.frames,
        "visual_tokens": measured.visual_tokens,
        "gen_length": gen_length,
        "block_length": block_length,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "rows": [_row(case, runs) for case in cases],
    }


def _row(case: Case, runs: dict[Case, list[Run]]) -> dict[str, Any]:
    """Medians of a case, beside full recompute at one token a step and at the case's own pace."""
    own, reference = runs[case], runs[next(iter(runs))]
    same_pace = next(found for other, found in runs.items() if (other.cache, other.pace) == (BASELINE, case.pace))
    total = statistics.median(run.total for run in own)
    last = own[-1].state
    ids, expected = last.answer_ids(), same_pace[-1].state.answer_ids()
    agreeing = sum(a == b for a, b in zip(ids, expected, strict=False))
    return {
        "cache": case.cache,
        "pace": case.pace,
        "steps": last.statistics.steps,
        "tokens": len(ids),
        "total_s": total,
        "least_s": min(run.total for run in own),
        "most_s": max(run.total for run in own),
        "first_token_s": statistics.median(run.first_token for run in own),
        "first_step_s": statistics.median(run.seconds[0] for run in own),
        "later_step_s": statistics.median(statistics.median(run.seconds[1:] or run.seconds) for run in own),
        "tokens_per_second": len(ids) / total,
        "times_faster": statistics.median(run.total for run in reference) / total,
        "layer_tokens": list(last.statistics.layer_tokens),
        "refreshes": last.statistics.refreshes,
        "peak_bytes": max(run.peak for run in own),
        "agreement": agreeing / max(1, len(ids), len(expected)),
    }


def decoding_table(figures: dict[str, Any]) -> str:
    """Markdown of `decoding_figures`."""
    head = ("cache", "a step", "steps", "total, s", "range, s", "first token, s", "first step, s", "later step, s",
            "tokens/s", "times faster", "tokens a layer (lowest, highest)", "peak, GiB", "same ids, %")  # fmt: skip
    title = (
        f"{figures['machine']}; size {figures['size']}, {figures['frames']} frames, {figures['visual_tokens']} visual "
        f"tokens, {figures['gen_length']} answer slots, blocks of {figures['block_length']}, {figures['dtype']}, "
        f"{figures['repeats']} interleaved repeats"
    )
    rows = []
    for row in figures["rows"]:
        work, peak = row["layer_tokens"], row["peak_bytes"]
        rows.append([
            row["cache"], row["pace"], str(row["steps"]), f"{row['total_s']:.2f}",
            f"{row['least_s']:.2f} to {row['most_s']:.2f}", f"{row['first_token_s']:.3f}",
            f"{row['first_step_s']:.3f}", f"{row['later_step_s']:.4f}", f"{row['tokens_per_second']:.2f}",
            f"{row['times_faster']:.1f}", f"{work[0]:,} to {work[-1]:,}",
            f"{peak / GIB:.2f}", f"{100 * row['agreement']:.0f}",
        ])  # fmt: skip
    return "\n".join([title, "", *table(head, rows)])
