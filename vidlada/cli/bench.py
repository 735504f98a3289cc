"""`vidlada bench`."""

import json
from typing import Any

import click

from vidlada.cli.options import answer_options, given_options, load_quietly, model_option, one_line_errors, progress


@click.group()
def bench() -> None:
    """Figures anyone can check: every ratio is to a baseline measured in the same run."""


@bench.command("video")
@click.option("--minutes", type=click.IntRange(1, 240), default=60, show_default=True, help="Length of the long file.")
@click.option("--frames", type=click.IntRange(1), default=64, show_default=True, help="Frames to sample from it.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def bench_video(minutes: int, frames: int, repeats: int, as_json: bool) -> None:
    """Sampling frames from a long and a short file, against decoding everything and against seeking every frame."""
    from vidlada.bench.video import video_figures, video_table

    with progress("measuring"):
        figures = video_figures(minutes, frames, repeats)
    click.echo(json.dumps(figures) if as_json else video_table(figures))


@bench.command("decode")
@click.option(
    "--size",
    type=click.Choice(["mid", "8b"]),
    default="mid",
    show_default=True,
    help="Shape of the random model: about 25 million weights for a CPU, or VidLaDA-8B's for a GPU.",
)
@click.option("--frames", type=click.IntRange(1), help="Of the video: 30 of 200 tokens (mid), 64 of 210 (8b).")
@click.option("--cache", "caches", multiple=True, help="May be repeated; all policies and MARS ablations by default.")
@click.option("--gen-length", type=click.IntRange(1), default=64, show_default=True, help="Answer tokens.")
@click.option("--block-length", type=click.IntRange(1), default=32, show_default=True, help="Decoded together.")
@click.option("--steps", type=click.IntRange(1), help="For the whole answer; one token a step by default.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Interleaved repeats.")
@click.option("--device", help="cpu, cuda …; the first GPU by default, else the CPU.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def bench_decode(
    size: str, caches: tuple[str, ...], device: str | None, dtype: str, as_json: bool, **options: Any
) -> None:
    """Decoding with every cache, against recomputing everything in each step."""
    import torch

    from vidlada.api import usable_device
    from vidlada.bench.decoding import CACHES, decoding_figures, decoding_table

    figures = decoding_figures(
        size, caches=caches or CACHES, device=usable_device(device), dtype=getattr(torch, dtype),
        progress=lambda what: click.echo(what, err=True), **options,
    )  # fmt: skip
    click.echo(json.dumps(figures) if as_json else decoding_table(figures))


@bench.command("drift")
@click.argument("video", type=click.Path())
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@answer_options
@model_option
@one_line_errors
def bench_drift(
    video: str, question: str, as_json: bool, model: str, device: str | None, dtype: str, **options: Any
) -> None:
    """How far states move between steps while QUESTION about VIDEO is answered, layer by layer.

    Tells what a cache may leave alone, and for how long; and where visual tokens look.
    """
    from vidlada.bench.drift import drift_figures, drift_table

    given = given_options(options)
    vidlada = load_quietly(model, dtype, device)
    with progress("measuring"):
        figures = drift_figures(vidlada.model, vidlada.chat(video, **given).request(question))
    click.echo(json.dumps(figures) if as_json else drift_table(figures))
