"""What commands share: errors in one line, progress on stderr, options."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from vidlada.errors import InputError, VidLaDAError
from vidlada.noise import quiet_libraries


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a user can cause into one line on stderr and an exit code: 2 for bad input, 1 for the rest."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with quiet_libraries():
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


@dataclass(frozen=True)
class ModelSource:
    """The model a command was asked to use.

    Attributes:
        model: its folder or name, of the hub with its revision.
        device, dtype, quantization, compiled: as `vidlada.load` takes them.
    """

    model: str
    device: str | None
    dtype: str
    quantization: str | None
    compiled: bool

    def load(self) -> Any:
        """Load it behind our own spinner instead of transformers' progress bars; a download shows the hub's."""
        from vidlada.api import load, model_folder

        folder = model_folder(self.model)
        without_progress_bars()
        with progress(f"loading {self.model}"):
            vidlada = load(folder, self.dtype, self.device, quantization=self.quantization, compiled=self.compiled)  # type: ignore[arg-type]
        vidlada.name = self.model
        return vidlada


revision_option = click.option("--revision", help="Branch, tag or commit of a model of the hub.")


def named(model: str, revision: str | None) -> str:
    """A model's name with its revision, as one name; a `UsageError` where it cannot have one."""
    from vidlada.model.hub import with_revision

    try:
        return with_revision(model, revision)
    except InputError as error:
        raise click.UsageError(str(error)) from error


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which model runs where; the command gets them as `source`."""

    @wraps(command)
    def wrapped(
        model: str, revision: str | None, device: str | None, dtype: str, quantization: str | None, compiled: bool,
        **options: Any,
    ) -> Any:  # fmt: skip
        return command(source=ModelSource(named(model, revision), device, dtype, quantization, compiled), **options)

    for option in (
        click.option("--compile", "compiled", is_flag=True,
                     help="Fuse what cached steps run (torch.compile); the first steps take seconds longer."),
        click.option("--quantize", "quantization", type=click.Choice(["int8", "int8-dynamic"]),
                     help="8-bit projections: weights only, or activations too."),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                     show_default=True, help="Type of the weights."),
        click.option("--device", help="cpu, cuda, cuda:1 …; the first GPU by default, else the CPU."),
        revision_option,
        click.option("--model", default="tiny", show_default=True,
                     help="The shipped model 'tiny', a checkpoint folder, or a name of the Hugging Face hub "
                          "(owner/name, owner/name@revision)."),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def pace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how frames are taken and answers are decoded, but for the cache."""
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


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how frames are taken and answers are decoded."""
    text = (
        "Reuse between steps: none, prefix, dual, frozen, interval, sparse or mars, with settings after a colon, e.g. "
    )
    return click.option("--cache", help=f"{text}mars:text=8,ratio=2.")(pace_options(command))


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def without_progress_bars() -> None:
    """Silence transformers' bars for every shard it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
