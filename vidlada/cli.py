"""The commands: parse, call, print. Nothing else lives here."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from vidlada import __version__
from vidlada.errors import VidLaDAError


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
    from vidlada.api import load

    if as_json and show:
        raise click.UsageError("--json and --show exclude each other")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    with progress(f"loading {model}"):
        vidlada = load(model, dtype=dtype, device=device)
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

    console = Console()
    with Live(console=console, refresh_per_second=20) as live:
        for draft in conversation.stream(question):
            text = Text()
            for piece, final in draft.pieces:
                if piece is None:
                    text.append("· ", style="dim")
                else:
                    text.append(f"{piece} ", style="bold" if final else "dim italic yellow")
            text.append(f"\nstep {draft.state.step}", style="dim")
            live.update(text)
        answer = conversation.last
        rate = answer.statistics.tokens_per_forward
        live.update(Text(f"{answer.text}\n").append(
            f"{answer.statistics.steps} steps, {rate:.2f} tokens per forward pass", style="dim"))  # fmt: skip


@main.command()
@click.argument("video", type=click.Path())
@click.option("--show", is_flag=True, help="Draw the answers denoising live.")
@answer_options
@model_option
@one_line_errors
def chat(video: str, show: bool, model: str, device: str | None, dtype: str, **options: Any) -> None:
    """Ask VIDEO several questions, one a line; an empty line or end of input closes.

    The video is decoded and encoded once. Every question stands alone: models of this size do not follow a
    conversation unless they were trained on one, so pass --remember to keep earlier turns.
    """
    from vidlada.api import load

    given = {name: value for name, value in options.items() if value not in (None, ())}
    with progress(f"loading {model}"):
        vidlada = load(model, dtype=dtype, device=device)
    with progress(f"watching {video}"):
        encoded = vidlada.watch(video, **{n: given.pop(n) for n in ("frames", "fps", "force_sample") if n in given})
    interactive = sys.stdin.isatty()
    click.echo(f"{video}: {len(encoded.times)} frames. Ask; an empty line ends.", err=True)
    conversation = vidlada.chat(encoded, **given)
    while True:
        if interactive:
            click.echo("> ", nl=False, err=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        if show:
            show_drafts(conversation, question)
        else:
            click.echo(conversation.ask(question).text)
