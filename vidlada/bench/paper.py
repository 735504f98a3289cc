"""The paper's speed table and ablation, repeated in small: the same protocol and rows, on random or shipped weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vidlada.bench.decoding import BASELINE, decoding_figures
from vidlada.decoding.commit import TopK
from vidlada.markdown import table

if TYPE_CHECKING:
    from vidlada.api import VidLaDA

# One token a step, as in the paper's speed table
SLOTS, BLOCK = 128, 32
PAPER = "mars:paper"
CACHES = {
    "full recompute": BASELINE, "Fast-dLLM, prefix": "prefix", "Fast-dLLM, dual": "dual", "dLLM-Cache": "dllm",
    "dKV-Cache": "dkv", "Elastic-Cache": "elastic", "Sparse-dLLM": "sparse", "MARS-Cache, as published": PAPER,
    "MARS-Cache, our defaults": "mars",
}  # fmt: skip
ABLATION = {
    "without anchors": f"{PAPER},anchors=0", "without chunk attention": f"{PAPER},window=-1",
    "without the pyramid": f"{PAPER},pyramid=1,text_pyramid=1", "R = 1": f"{PAPER},ratio=1",
    "R = 4": f"{PAPER},ratio=4", "R = 8": f"{PAPER},ratio=8", "128 anchor queries": f"{PAPER},queries=128",
}  # fmt: skip
ROWS = CACHES | ABLATION


def paper_figures(
    size: str,
    frames: int | None = None,
    vidlada: "VidLaDA | None" = None,
    entries: Sequence[dict[str, Any]] = (),
    folder: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Speed of every row, and with questions the right answers too.

    Args:
        size, frames, device, dtype: as of `vidlada.bench.decoding.decoding_figures`.
        vidlada: answers the questions.
        entries, folder: of a shapes dataset; none for speed alone.
        progress: called with what is measured next.

    Returns:
        `speed` as of `decoding_figures`, and `quality` as of `quality_figures` or None.
    """
    caches = list(ROWS.values())
    speed = decoding_figures(
        size, frames, caches, SLOTS, BLOCK, tokens_per_step=None, device=device, dtype=dtype, progress=progress
    )
    quality = None
    if vidlada is not None and folder is not None:
        from vidlada.bench.quality import quality_figures

        quality = quality_figures(vidlada, entries, folder, caches, progress=progress)
    return {"speed": speed, "quality": quality}


def paper_table(figures: dict[str, Any]) -> str:
    """Markdown of `paper_figures`."""
    speed, quality = figures["speed"], figures["quality"]
    fast = {row["cache"]: row for row in speed["rows"] if row["pace"] == "1 token"}
    right = {row["cache"]: row for row in quality["rows"] if row["commit"] == TopK.name} if quality else {}
    head = ["", "cache", "tokens/s", "times faster", "later step, s"]
    head += ["right short answers, %", "captions, %", "same answers, %"] if quality else []
    rows = []
    for name, cache in ROWS.items():
        row = fast[cache]
        cells = [name, cache, f"{row['tokens_per_second']:.2f}", f"{row['times_faster']:.1f}",
                 f"{row['later_step_s']:.4f}"]  # fmt: skip
        if quality:
            found = right[cache]
            cells += [f"{found['short_percent']:.1f} ± {found['short_standard_error']:.1f}",
                      f"{found['long_percent']:.1f} ± {found['long_standard_error']:.1f}",
                      f"{found['same_percent']:.1f}"]  # fmt: skip
        rows.append(cells)
    title = (
        f"{speed['machine']}; size {speed['size']}, {speed['frames']} frames, {speed['visual_tokens']} visual tokens, "
        f"{SLOTS} answer slots, blocks of {BLOCK}, one token a step, {speed['dtype']}"
    )
    if quality:
        title += (
            f"; answers by {quality['model']} to {quality['short_questions']} short and {quality['long_questions']} "
            "long questions"
        )
    return "\n".join([title, "", *table(head, rows)])
