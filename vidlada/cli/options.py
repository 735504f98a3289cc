"""Shared parts of the commands: one-line errors, progress on stderr, options."""

import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass
from functools import wraps
from typing import Any

import click

from vidlada.errors import InputError, VidLaDAError
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.noise import quiet_libraries
from vidlada.settings import Setting, settings_of
from vidlada.video import Sampling


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print expected errors as one line on stderr; exit with 2 for bad input and 1 for the rest."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with quiet_libraries():
                return command(*args, **kwargs)
        except VidLaDAError as error:
            message = " ".join(str(error).split()).encode(errors="backslashreplace").decode()  # of names in no encoding
            click.echo(f"error: {message}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(0)

    return wrapper


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


@contextmanager
def download_progress() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """Takes the progress of downloads and shows it on stderr; None when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(url: str, done: int, total: int | None) -> None:
        share = f"{done / 2**20:.1f}" + ("" if total is None else f" of {total / 2**20:.1f}")
        click.echo(f"\r\033[K{url}: {share} MiB", nl=done == total, err=True)

    yield show


@dataclass(frozen=True)
class ModelSource:
    """The model given to a command, and how to load it.

    Attributes:
        model: its folder or name, of the hub with its revision.
        device, dtype, quantization, compiled, graphs: as `vidlada.load` takes them.
    """

    model: str
    device: str | None
    dtype: str
    quantization: str | None
    compiled: bool
    graphs: bool | None = None

    def load(self, tensor_parallel: int = 1) -> Any:
        """Load it behind our own spinner instead of transformers' progress bars; a download shows the hub's."""
        from vidlada.loading import load
        from vidlada.model.hub import model_folder

        folder = model_folder(self.model)
        without_progress_bars()
        with progress(f"loading {self.model}"):
            vidlada = load(
                folder, self.dtype, self.device, quantization=self.quantization, compiled=self.compiled,  # type: ignore[arg-type]
                graphs=self.graphs, tensor_parallel=tensor_parallel,
            )  # fmt: skip
        vidlada.name = self.model
        return vidlada


REVISION_HELP = "Branch, tag or commit of a model of the hub; also owner/name@revision."
revision_option = click.option("--revision", help=REVISION_HELP)


def name_with_revision(model: str, revision: str | None) -> str:
    """Combine a model's name and revision; `UsageError` where it cannot have one."""
    from vidlada.model.hub import with_revision

    try:
        return with_revision(model, revision)
    except InputError as error:
        raise click.UsageError(str(error)) from error


class GroupedOption(click.Option):
    """An option that belongs to a group of the help page."""

    def __init__(self, *args: Any, group: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help page lists its options in groups, the ones a newcomer needs first.

    Args:
        own: heading of the options that name no group, those of this command alone.
    """

    def __init__(self, *args: Any, own: str = "Output", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own = own

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Groups in their order."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Common", self.own, *GROUPS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups[getattr(parameter, "group", self.own)].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


GROUPS = ("Model", "Video", "Prompt", "Decoding", "Limits")


class NumberOr(click.ParamType):
    """A number, or one of some words."""

    def __init__(self, kind: type, words: tuple[str, ...]):
        self.kind, self.words = kind, words
        self.name = f"number or {' or '.join(words)}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number or the word."""
        if value in self.words:
            return value
        try:
            return self.kind(value)
        except ValueError:
            return self.fail(f"{value!r} is neither a whole number nor {' or '.join(self.words)}", param, ctx)


def setting_option(name: str, entry: Field[Any], listed: Setting, kind: type, group: str) -> Any:
    """The option of a listed setting; without a value it is not given, so that the checkpoint's default counts."""
    # defaults of decoding are the checkpoint's own
    default = f"  [default: {entry.default}]" if group == "Video" and entry.default else ""
    group = "Common" if listed.essential else group
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flags = f"{flag}/--no-{flag[2:]}" if entry.default is None else flag
        return click.option(flags, name, is_flag=True, default=None, help=listed.help, cls=GroupedOption, group=group)
    if listed.choices:
        value_kind: Any = click.Choice(listed.choices) if kind is str else NumberOr(kind, listed.choices)
    else:
        value_kind = kind
    return click.option(
        flag,
        name,
        type=value_kind,
        multiple=isinstance(entry.default, tuple),
        help=listed.help + default,
        metavar=listed.metavar,
        cls=GroupedOption,
        group=group,
    )


def setting_options(
    cls: Any, group: str, skip: Container[str] = (), only: Container[str] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """One option for every listed setting of a dataclass, but for those in `skip`; or for those in `only`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, (entry, listed, kind) in reversed(settings_of(cls).items()):
            if name not in skip and (only is None or name in only):
                command = setting_option(listed.alias or name, entry, listed, kind, group)(command)
        return command

    return decorate


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the model and its device; the command gets them as `source`."""

    @wraps(command)
    def wrapper(
        model: str, revision: str | None, device: str | None, dtype: str, quantization: str | None, compiled: bool,
        no_graphs: bool, **options: Any,
    ) -> Any:  # fmt: skip
        name, graphs = name_with_revision(model, revision), False if no_graphs else None
        return command(source=ModelSource(name, device, dtype, quantization, compiled, graphs), **options)

    for group, names, settings in (
        ("Model", ("--compile", "compiled"),
         {"is_flag": True, "help": "Fuse what cached steps run (torch.compile); the first steps take seconds longer."}),
        ("Model", ("--no-graphs",),
         {"is_flag": True, "help": "On a GPU, launch repeated passes kernel by kernel, not as CUDA graphs."}),
        ("Model", ("--quantize", "quantization"),
         {"type": click.Choice(["int8", "int8-dynamic", "float8", "float8-dynamic", "int4"]),
          "help": "Smaller projections: weights in 8 or 4 bits; -dynamic: products in 8 bits too."}),
        ("Model", ("--dtype",),
         {"type": click.Choice(["auto", "float32", "bfloat16", "float16"]), "default": "auto", "show_default": True,
          "help": "Type of the weights."}),
        ("Common", ("--device",), {"help": "cpu, cuda, cuda:1 …; the first GPU by default, else the CPU."}),
        ("Model", ("--revision",), {"help": REVISION_HELP}),
        ("Common", ("--model",),
         {"default": "tiny", "show_default": True,
          "help": "The shipped model 'tiny', a checkpoint folder, or a name of the Hugging Face hub (owner/name)."}),
    ):  # fmt: skip
        wrapper = click.option(*names, cls=GroupedOption, group=group, **settings)(wrapper)
    return wrapper


def pace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of frame sampling and decoding, without the cache."""
    command = setting_options(GenerationSettings, "Decoding", skip=("cache", "reuse"))(command)
    command = setting_options(PromptSettings, "Prompt")(command)
    return setting_options(Sampling, "Video")(command)


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of frame sampling and decoding, without `reuse`."""
    return setting_options(GenerationSettings, "Decoding", only=("cache",))(pace_options(command))


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def without_progress_bars() -> None:
    """Silence transformers' bars for every shard it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
