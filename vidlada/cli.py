"""The commands: parse, call, print. Nothing else lives here."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from vidlada import __version__
from vidlada.errors import InputError, VidLaDAError


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a user can cause into one line on stderr and an exit code: 2 for bad input, 1 for the rest."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except VidLaDAError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(0)

    return wrapped


@contextmanager
def progress(message: str) -> Iterator[None]:
    """A spinner on stderr while something takes long; nothing when stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        yield


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vidlada")
def main() -> None:
    """Ask videos questions with VidLaDA, a video language model built on masked diffusion."""


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which model runs where."""
    for option in (
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                     show_default=True, help="Type of the weights."),
        click.option("--device", help="cpu, cuda, cuda:1 …; the first GPU by default, else the CPU."),
        click.option("--model", default="tiny", show_default=True,
                     help="The shipped model 'tiny', or a checkpoint folder."),
    ):  # fmt: skip
        command = option(command)
    return command


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how frames are taken and answers are decoded."""
    for option in (
        click.option("--frames", type=click.IntRange(1), default=64, show_default=True, help="Most frames to take."),
        click.option("--fps", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
                     help="Candidate frames a second."),
        click.option("--force-sample", is_flag=True, help="Always take --frames frames, evenly spaced."),
        click.option("--time-instruction", is_flag=True, help="Tell the model when its frames were taken."),
        click.option("--system", help="System message instead of the checkpoint's own."),
        click.option("--gen-length", type=int, help="Answer slots, in tokens."),
        click.option("--block-length", type=int, help="Slots decoded together; divides --gen-length."),
        click.option("--steps", type=int, help="Denoising steps for the whole answer; one token a step by default."),
        click.option("--threshold", type=float, help="Commit every token at least this confident, e.g. 0.9."),
        click.option("--factor", type=float, help="Commit the largest n with (n+1)(1-confidence) below this."),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--cfg-scale", type=float, help="Classifier-free guidance; 0 is off."),
        click.option("--remasking", type=click.Choice(["low_confidence", "random"]), help="How tokens are ranked."),
        click.option("--stop", multiple=True, help="A string that ends the answer; may be repeated."),
        click.option("--suffix", help="Fixed text after the answer, visible from the first step."),
        click.option("--seed", type=int, help="Of every random choice."),
        click.option("--cache", help="Reuse between steps: none, prefix, dual, frozen, interval, sparse or mars, with "
                     "settings after a colon, e.g. mars:text=8,ratio=2."),
    ):  # fmt: skip
        command = option(command)
    return command


@main.command()
@click.argument("video", type=click.Path())
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: answer, model, frames, statistics.")
@click.option("--show", is_flag=True, help="Draw the answer denoising live.")
@answer_options
@model_option
@one_line_errors
def ask(
    video: str, question: str, as_json: bool, show: bool, model: str, device: str | None, dtype: str, **options: Any
) -> None:
    """Ask VIDEO a QUESTION and print the answer.

    VIDEO is a video file, a folder of images, or an image.
    """
    if as_json and show:
        raise click.UsageError("--json and --show exclude each other")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    vidlada = load_quietly(model, dtype, device)
    with progress(f"watching {video}"):
        conversation = vidlada.chat(video, **given)
    if show:
        show_drafts(conversation, question)
    else:
        with progress("denoising"):
            conversation.ask(question)
    answer = conversation.last
    if as_json:
        click.echo(json.dumps(answer_object(vidlada.name, video, question, conversation), ensure_ascii=False))
    elif not show:
        click.echo(answer.text)


def answer_object(model: str, video: str, question: str, conversation: Any) -> dict[str, Any]:
    """What `--json` prints."""
    answer = conversation.last
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "model": model,
        "video": video,
        "question": question,
        "frames": [{"time": round(time, 3)} for time in answer.frame_times],
        "settings": answer.settings.to_dict(),
        "statistics": answer.statistics.to_dict(),
    }


def show_drafts(conversation: Any, question: str) -> None:
    """Draw the answer while it denoises: final tokens bold, provisional ones dim, open slots as dots."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), refresh_per_second=20) as live:
        for draft in conversation.stream(question):
            text = Text()
            for piece, final in draft.pieces:
                if piece is None:
                    text.append(" ·", style="dim")
                else:
                    text.append(piece, style="bold" if final else "dim italic yellow")
            text.append(f"\nstep {draft.state.step}", style="dim")
            live.update(text)
        answer = conversation.last
        counts = f"{answer.statistics.steps} steps, {answer.statistics.tokens_per_forward:.2f} tokens per forward pass"
        live.update(Text(f"{answer.text}\n").append(counts, style="dim"))


def load_quietly(model: str, dtype: str, device: str | None) -> Any:
    """Load a model behind our own spinner instead of transformers' progress bars."""
    from vidlada.api import load

    without_progress_bars()
    with progress(f"loading {model}"):
        return load(model, dtype=dtype, device=device)


def without_progress_bars() -> None:
    """Silence transformers' bars for every shard it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@main.command()
@click.argument("video", type=click.Path())
@click.option("--show", is_flag=True, help="Draw the answers denoising live.")
@answer_options
@model_option
@one_line_errors
def chat(video: str, show: bool, model: str, device: str | None, dtype: str, **options: Any) -> None:
    """Ask VIDEO several questions, one a line; an empty line or the end of input closes.

    The video is decoded and encoded once. Models trained on conversations also see the earlier turns.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    vidlada = load_quietly(model, dtype, device)
    with progress(f"watching {video}"):
        conversation = vidlada.chat(video, **given)
    click.echo(f"{video}: {len(conversation.video.times)} frames. Ask; an empty line ends.", err=True)
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        if show:
            show_drafts(conversation, question)
        else:
            click.echo(conversation.ask(question).text)


@main.command()
@click.argument("model", default="tiny")
@click.option("--frames", type=click.IntRange(1), default=64, show_default=True, help="Estimate memory for so many.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Estimate memory in this type.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def info(model: str, frames: int, dtype: str, as_json: bool) -> None:
    """Tell what checkpoint MODEL is, what memory a run needs, and what this machine has. Loads no weights."""
    from vidlada.api import model_folder
    from vidlada.checkpoint import describe
    from vidlada.info import checkpoint_facts, machine_facts

    facts = {"checkpoint": checkpoint_facts(describe(model_folder(model)), frames, dtype), "machine": machine_facts()}
    if as_json:
        click.echo(json.dumps(facts))
        return
    for group, values in facts.items():
        click.echo(group)
        for name, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            elif isinstance(value, int) and not isinstance(value, bool):
                value = f"{value:,}"
            click.echo(f"  {name.replace('_', ' ')}: {value if value != [] else 'none'}")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(["vidlada", "published", "llada"]), default="vidlada",
              show_default=True, help="Layout to write.")  # fmt: skip
@one_line_errors
def convert(source: Path, target: Path, layout: Any) -> None:
    """Write checkpoint SOURCE in another layout as TARGET, a new folder."""
    from vidlada.checkpoint import convert as convert_checkpoint

    with progress(f"converting {source}"):
        convert_checkpoint(source, target, layout)
    click.echo(f"{target}: written in the {layout} layout", err=True)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--output", help="Folder of checkpoints, logs and the model, instead of the config's.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in the output folder.")
@one_line_errors
def train(config: Path, output: str | None, resume: bool) -> None:
    """Train as CONFIG (YAML) says. An interrupted run continues with --resume, on the same curve."""
    from vidlada.training.config import load_config
    from vidlada.training.trainer import train as run

    without_progress_bars()
    folder = run(load_config(config, output=output), resume=resume, report=lambda line: click.echo(line, err=True))
    click.echo(str(folder))


@main.group()
def shapes() -> None:
    """The synthetic world the shipped model was trained on: write its clips and questions, score a model."""


@shapes.command("write")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--clips", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first clip.")
@click.option("--questions", type=click.IntRange(0), default=10, show_default=True, help="Most short ones a clip.")
@click.option("--seconds", type=click.IntRange(2, 60), help="Length of every clip; drawn by default.")
@click.option("--size", type=click.IntRange(49), default=224, show_default=True, help="Pixels along a side.")
@click.option("--no-clock", is_flag=True, help="Leave out the running clock in the corner.")
@one_line_errors
def shapes_write(folder: Path, no_clock: bool, **options: Any) -> None:
    """Write H.264 clips and their questions, in the LLaVA json format, to FOLDER."""
    from vidlada.shapes.dataset import write_dataset

    with progress("writing clips"):
        click.echo(str(write_dataset(folder, clock=not no_clock, **options)))


@shapes.command("evaluate")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--blind", is_flag=True, help="Ask without the videos: what the questions give away by themselves.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write scores and every answer as JSON here.")
@answer_options
@model_option
@one_line_errors
def shapes_evaluate(
    questions: Path, blind: bool, report: Path | None, model: str, device: str | None, dtype: str, **options: Any
) -> None:
    """Ask a model every question of QUESTIONS (from `vidlada shapes write`) and print its scores by family."""
    from vidlada.shapes.benchmark import evaluate, read_questions

    entries = read_questions(questions)
    if report is not None and report.exists():
        raise InputError(f"{report} exists; choose another file")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    vidlada = load_quietly(model, dtype, device)

    def answers(video: Path | None, asked: Sequence[str]) -> list[str]:
        return [answer.text for answer in vidlada.ask_many([(video, question) for question in asked], **given)]

    def show(done: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{done} of {len(entries)} questions", nl=done == len(entries), err=True)

    result = evaluate(entries, questions.parent, answers, blind=blind, progress=show)
    if report is not None:
        report.write_text(json.dumps({"model": model, "blind": blind, **result.to_dict()}, indent=1))
    click.echo(result.table())


@main.group()
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

    given = {name: value for name, value in options.items() if value not in (None, ())}
    vidlada = load_quietly(model, dtype, device)
    with progress("measuring"):
        figures = drift_figures(vidlada.model, vidlada.chat(video, **given).request(question))
    click.echo(json.dumps(figures) if as_json else drift_table(figures))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, e.g. for bash: source <(vidlada completion bash)"""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(main, {}, "vidlada", "_VIDLADA_COMPLETE").source())
