"""`vidlada bench`."""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import (
    ModelSource,
    answer_options,
    given_options,
    model_option,
    one_line_errors,
    pace_options,
    progress,
)
from vidlada.errors import InputError


@click.group(short_help="Measure speed, fidelity and quality.")
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


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what model is measured, and where."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--device", help="cpu, cuda …; the first GPU by default, else the CPU."),
        click.option("--size", type=click.Choice(["tiny", "mid", "8b"]), default="mid", show_default=True,
                     help="The shipped model; or random weights: 25 million for a CPU, or VidLaDA-8B's shape."),
    ):  # fmt: skip
        command = option(command)
    return command


caches_option = click.option("--cache", "caches", multiple=True,
                             help="May be repeated; all policies and MARS ablations by default.")  # fmt: skip

dtype_option = click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                            show_default=True, help="Type of the weights.")  # fmt: skip


also_option = click.option("--also", "changes", multiple=True, metavar="SETTING=VALUE",
                           help="Once more with this setting, e.g. temperature=0.7; may be repeated.")  # fmt: skip


def read_value(text: str) -> Any:
    """A number, a truth value or, where it is neither, a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_variations(changes: Sequence[str]) -> list[dict[str, Any]]:
    """Of each SETTING=VALUE the setting."""
    return [{name: read_value(value)} for name, _, value in (change.partition("=") for change in changes)]


def measuring(device: str | None, dtype: str | None = None) -> dict[str, Any]:
    """What every benchmark of a model takes besides its options."""
    import torch

    from vidlada.loading import usable_device

    kind = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    return {"device": usable_device(device), "progress": lambda what: click.echo(what, err=True), **kind}


@bench.command("decode")
@click.option(
    "--frames", type=click.IntRange(1), help="Of the video: 60 of 12 tokens (tiny), 30 of 200 (mid), 64 of 210 (8b)."
)
@caches_option
@click.option("--gen-length", type=click.IntRange(1), default=64, show_default=True, help="Answer tokens.")
@click.option("--block-length", type=click.IntRange(1), default=32, show_default=True, help="Decoded together.")
@click.option("--threshold", type=float, default=0.9, show_default=True, help="Of the faster pace of tiny.")
@click.option(
    "--tokens-per-step",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Stands in for a threshold where weights are random and never confident.",
)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Interleaved repeats.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw the totals, to this new file (png, svg …).")
@dtype_option
@size_options
@one_line_errors
def bench_decode(
    caches: tuple[str, ...], device: str | None, dtype: str, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """Decoding with every cache, against recomputing everything in each step."""
    from vidlada.bench.decoding import CACHES, decoding_figures, decoding_table
    from vidlada.bench.plots import decoding_plot, new_plot

    if plot is not None:
        new_plot(plot)
    figures = decoding_figures(caches=caches or CACHES, **measuring(device, dtype), **options)
    if plot is not None:
        decoding_plot(figures, plot)
    click.echo(json.dumps(figures) if as_json else decoding_table(figures))


@bench.command("pass")
@click.option("--frames", type=click.IntRange(1), help="Of the video, as for decode.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@dtype_option
@size_options
@one_line_errors
def bench_pass(device: str | None, dtype: str, as_json: bool, **options: Any) -> None:
    """One pass over a whole prompt, against transformers' Llama of the same shape and weights."""
    from vidlada.bench.passes import pass_figures, pass_table

    figures = pass_figures(**measuring(device, dtype), **options)
    click.echo(json.dumps(figures) if as_json else pass_table(figures))


@bench.command("scaling")
@click.option(
    "--frames",
    type=click.IntRange(1),
    multiple=True,
    default=(5, 10, 20, 40),
    show_default=True,
    help="May be repeated.",
)
@dtype_option
@size_options
@one_line_errors
def bench_scaling(device: str | None, dtype: str, as_json: bool, **options: Any) -> None:
    """A cached step as the video grows, against what it has to read."""
    from vidlada.bench.passes import scaling_figures, scaling_table

    figures = scaling_figures(**measuring(device, dtype), **options)
    click.echo(json.dumps(figures) if as_json else scaling_table(figures))


@bench.command("count")
@click.option("--size", type=click.Choice(["mid", "8b"]), default="8b", show_default=True, help="Shape of the model.")
@click.option("--frames", type=click.IntRange(1), help="Of the video: 30 of 200 tokens (mid), 64 of 210 (8b).")
@click.option("--cache", "caches", multiple=True, help="May be repeated; all policies by default.")
@click.option("--commit", "commits", multiple=True, help="Commit rule; may be repeated, topk by default.")
@also_option
@click.option("--gen-length", type=click.IntRange(1), default=128, show_default=True, help="Answer tokens.")
@click.option("--block-length", type=click.IntRange(1), default=32, show_default=True, help="Decoded together.")
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True, help="Counted of each answer.")
@click.option("--requests", "rows", type=click.IntRange(1), default=1, show_default=True, help="That run together.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def bench_count(
    caches: tuple[str, ...], commits: tuple[str, ...], changes: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Kernels, host waits, bytes and arithmetic of a step on a GPU, counted on a machine without one.

    By default every cache; and with mars commit rules that need more of a step than topk, and sampling.
    """
    from vidlada.bench.count import CACHES, count_figures, count_table

    if caches or commits or changes:
        rules = [{"commit": commit} for commit in commits] or [{}]
        variations = read_variations(changes)
        options["ways"] = [
            {"cache": cache, **rule, **variation}
            for cache in caches or CACHES
            for rule in rules
            for variation in ({}, *variations)
        ]
    figures = count_figures(progress=lambda what: click.echo(what, err=True), **options)
    click.echo(json.dumps(figures) if as_json else count_table(figures))


@bench.command("gpu")
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="Folder of the results; those in it are kept.")  # fmt: skip
@click.option("--device", help="cuda, cuda:1, cpu; the first GPU by default, else the CPU.")
@click.option("--size", type=click.Choice(["tiny", "mid", "8b"]), help="Random weights; 8b on a GPU, tiny on a CPU.")
@click.option("--frames", type=click.IntRange(1), help="Of the video; the size's own by default.")
@click.option("--stage", "stages", multiple=True, help="May be repeated; all by default.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="For each stage; its own budget by default.")
@one_line_errors
def bench_gpu(out: Path, device: str | None, size: str | None, **options: Any) -> None:
    """All that was predicted for a GPU beside what this one measures, in less than 40 minutes.

    Without this package's dependencies: python -m vidlada.bench.gpu --out DIR.
    """
    from vidlada.bench import gpu
    from vidlada.loading import usable_device

    device = usable_device(device)
    size = size or ("8b" if device.startswith("cuda") else gpu.TINY)
    click.echo(gpu.bench_gpu(out, device, size, **options).read_text())


@bench.command("weights")
@click.option("--frames", type=click.IntRange(1), help="Of the video, as for decode.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@size_options
@one_line_errors
def bench_weights(device: str | None, as_json: bool, **options: Any) -> None:
    """Steps with 8-bit, bfloat16 and compiled weights, against float32."""
    from vidlada.bench.weights import weights_figures, weights_table

    figures = weights_figures(**measuring(device), **options)
    click.echo(json.dumps(figures) if as_json else weights_table(figures))


def questions_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What benchmarks take that put the questions of a shapes dataset to every cache."""
    command = caches_option(pace_options(model_option(one_line_errors(command))))
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    return click.argument("questions", type=click.Path(path_type=Path))(command)


def print_figures_of_questions(
    figures_of: Callable[..., dict[str, Any]], table: Callable[[dict[str, Any]], str], questions: Path,
    caches: tuple[str, ...], source: ModelSource, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Run such a benchmark; the options are those of `questions_options`."""
    from vidlada.bench.decoding import CACHES
    from vidlada.shapes.benchmark import read_questions

    entries = read_questions(questions)
    figures = figures_of(
        source.load(), entries, questions.parent, caches or CACHES,
        progress=lambda what: click.echo(what, err=True), **given_options(options),
    )  # fmt: skip
    click.echo(json.dumps(figures) if as_json else table(figures))


@bench.command("quality")
@click.option("--rule", "commits", multiple=True, help="Commit rule; may be repeated, topk by default.")
@click.option("--all-rules", is_flag=True, help="Every commit rule with its defaults.")
@also_option
@questions_options
def bench_quality(commits: tuple[str, ...], all_rules: bool, changes: tuple[str, ...], **options: Any) -> None:
    """What every cache and commit rule costs in right answers to QUESTIONS (from `vidlada shapes write`), and saves in
    passes and work.
    """
    from functools import partial

    from vidlada.bench.quality import quality_figures, quality_table
    from vidlada.decoding.commit import RULES, TopK

    rules = commits or (tuple(RULES) if all_rules else (TopK.name,))
    figures_of = partial(quality_figures, commits=rules, variations=read_variations(changes))
    print_figures_of_questions(figures_of, quality_table, **options)


@bench.command("paper")
@click.option("--frames", type=click.IntRange(1), help="Of the video; the size's own by default.")
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help="Of a shapes dataset (vidlada shapes write): also count the shipped model's right answers.",
)
@dtype_option
@size_options
@one_line_errors
def bench_paper(device: str | None, dtype: str, questions: Path | None, as_json: bool, **options: Any) -> None:
    """The paper's speed table and ablation in small: 128 tokens, one a step, every cache, every part of MARS-Cache."""
    from vidlada.bench.paper import paper_figures, paper_table
    from vidlada.loading import load
    from vidlada.shapes.benchmark import read_questions

    if questions is not None:
        entries = read_questions(questions)
        options |= {"vidlada": load(device=device), "entries": entries, "folder": questions.parent}
    figures = paper_figures(**measuring(device, dtype), **options)
    click.echo(json.dumps(figures) if as_json else paper_table(figures))


@bench.command("fidelity")
@questions_options
def bench_fidelity(**options: Any) -> None:
    """How far every cache's predictions are from full recompute's, on the long answers among QUESTIONS."""
    from vidlada.bench.fidelity import fidelity_figures, fidelity_table

    print_figures_of_questions(fidelity_figures, fidelity_table, **options)


@bench.command("drift")
@click.argument("video", type=click.Path())
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@answer_options
@model_option
@one_line_errors
def bench_drift(video: str, question: str, as_json: bool, source: ModelSource, **options: Any) -> None:
    """How far states move between steps while QUESTION about VIDEO is answered, layer by layer.

    Tells what a cache may leave alone, and for how long; and where visual tokens look.
    """
    from vidlada.bench.drift import drift_figures, drift_table

    given = given_options(options)
    vidlada = source.load()
    with progress("measuring"):
        figures = drift_figures(vidlada.model, vidlada.chat(video, **given).request(question))
    click.echo(json.dumps(figures) if as_json else drift_table(figures))


@bench.command("serve")
@click.option("--model", default="tiny", show_default=True, help="The shipped model 'tiny', or a checkpoint folder.")
@click.option("--device", help="cpu, cuda …; the first GPU by default, else the CPU.")
@click.option("--clients", type=click.IntRange(1), multiple=True, help="May be repeated; 1, 4 and 16 by default.")
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True, help="At each number of clients.")
@click.option("--gen-length", type=click.IntRange(1), default=64, show_default=True, help="Answer slots.")
@click.option("--memory-requests", type=click.IntRange(0), default=0, show_default=True,
              help="Further requests over which the server's memory is watched.")  # fmt: skip
@click.option(
    "--mixed-requests",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Further requests of mixed length that arrive at random, reported as vLLM's benchmark does.",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Of those, a second."
)
@click.option("--goodput", multiple=True,
              help="What a request must keep to: ttft:500, tpot:50, e2el:3000 (ms). May be repeated.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def bench_serve(
    clients: tuple[int, ...], goodput: tuple[str, ...], device: str | None, as_json: bool, **options: Any
) -> None:
    """Requests a second and latency of `vidlada serve`, against serving one request at a time."""
    from vidlada.bench.serve import serve_figures, serve_table

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as an exception: it ends the servers
    kept = dict(parse_goodput(text) for text in goodput)
    figures = serve_figures(clients=clients or (1, 4, 16), goodput=kept, **measuring(device), **options)
    click.echo(json.dumps(figures) if as_json else serve_table(figures))


def parse_goodput(text: str) -> tuple[str, float]:
    """A time and the milliseconds it may take."""
    name, _, most = text.partition(":")
    try:
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError
        return name, float(most)
    except ValueError:
        raise InputError(f"--goodput {text}: give ttft, tpot or e2el and milliseconds, as ttft:500") from None


@bench.command("train")
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True, help="Of each loop.")
@click.option("--packing-steps", type=click.IntRange(2), default=12, show_default=True, help="Of each kind of row.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Conversations a step.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def bench_train(steps: int, packing_steps: int, batch_size: int, as_json: bool) -> None:
    """A training step against a plain loop's, and packed rows of conversations against padded ones, on the CPU."""
    from vidlada.bench.training import overhead_figures, overhead_table, packing_figures, packing_table

    def show(what: str) -> None:
        click.echo(what, err=True)

    overhead = overhead_figures(steps, show)
    packing = packing_figures(packing_steps, batch_size, show)
    if as_json:
        click.echo(json.dumps({"overhead": overhead, "packing": packing}))
    else:
        click.echo(f"{overhead_table(overhead)}\n\n{packing_table(packing)}")
