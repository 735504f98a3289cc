"""`vidlada ask` and `vidlada chat`."""

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import (
    GroupedCommand,
    GroupedOption,
    ModelSource,
    answer_options,
    download_progress,
    given_options,
    model_option,
    one_line_errors,
    progress,
    setting_options,
)
from vidlada.errors import InputError
from vidlada.fetch import Fetching
from vidlada.files import json_line
from vidlada.generation import GenerationSettings
from vidlada.settings import settings_of


@click.command(cls=GroupedCommand, short_help="Ask a question about videos and images.")
@click.argument("media", nargs=-1, required=True, metavar="MEDIA...")
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: answer, model, frames, statistics.")
@click.option("--show", is_flag=True, help="Draw the answer denoising live.")
@click.option("--choices", help="Answers to choose from, with commas between them: the likeliest is printed.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, metavar="N", group="Model", cls=GroupedOption,
              help="Divide the model's layers among N processes, each with a GPU of its own.")  # fmt: skip
@setting_options(Fetching, "Limits")
@answer_options
@model_option
@one_line_errors
def ask(
    media: tuple[str, ...], question: str, as_json: bool, show: bool, choices: str | None, tensor_parallel: int,
    source: ModelSource, **options: Any,
) -> None:  # fmt: skip
    """Ask a QUESTION about videos and images and print the answer.

    MEDIA are video files, folders of images, images, or http(s) addresses of such. They are shown in front of the
    question, in order, or in the places of as many <image> marks in it.
    """
    if as_json and show:
        raise click.UsageError("--json and --show exclude each other")
    if show and choices:
        raise click.UsageError("--choices and --show exclude each other: choosing decodes nothing")
    if tensor_parallel > 1:
        in_processes(tensor_parallel, source.device)
    vidlada, conversation = watch(media, source, options, tensor_parallel)
    if show:
        show_drafts(conversation, question)
    else:
        with progress("denoising"):
            conversation.ask(question, choices and [choice.strip() for choice in choices.split(",")])
    answer = conversation.last
    if as_json:
        click.echo(json_line(answer_object(vidlada.name, media, question, conversation)))
    elif not show:
        click.echo(answer.text)


def in_processes(count: int, device: str | None) -> None:
    """Run this command in several processes and exit; within one of them, go on, silent in all but the first."""
    from vidlada.model.parallel import check_devices, is_main_process, launch, world_size

    if world_size() == 1:
        check_devices(count, device)
        sys.exit(launch(sys.argv[1:], count))
    if not is_main_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that are generation settings."""
    return {name: value for name, value in given.items() if name in settings_of(GenerationSettings)}


def watch(
    media: tuple[str, ...],
    source: ModelSource,
    options: dict[str, Any],
    tensor_parallel: int = 1,
    several: bool = False,
) -> tuple[Any, Any]:
    """Load the model and encode the media; `several` questions reuse a third of the layers by default."""
    given = given_options(options)
    vidlada = source.load(tensor_parallel)
    if several and "reuse" not in given and vidlada.settings(**generation_options(given)).cache != "none":
        given["reuse"] = max(1, vidlada.model.config.text.num_hidden_layers // 3)
    with download_progress() as vidlada.progress, progress(f"watching {', '.join(media)}"):
        return vidlada, vidlada.chat(list(media), **given)


def answer_object(model: str, media: tuple[str, ...], question: str, conversation: Any) -> dict[str, Any]:
    """Build the object that `--json` prints."""
    answer = conversation.last
    shown = [
        {
            "source": source,
            "kind": "image" if medium.is_image else "video",
            "visual_tokens": len(medium.visual_tokens),
            "frames": [{"time": round(time, 3)} for time in medium.times],
        }
        for source, medium in zip(media, conversation.media, strict=True)
    ]
    chosen = {} if answer.choices is None else {"choices": answer.choices}
    return {
        "answer": answer.text,
        **chosen,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        "finish_reason": answer.finish_reason,
        "model": model,
        "video": media[0] if len(media) == 1 else None,
        "media": shown,
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
            if draft.reasoning and draft.text:
                text = Text(f"{draft.reasoning}\n\n", style="dim") + text
            text.append(f"\nstep {draft.state.step}", style="dim")
            live.update(text)
        answer = conversation.last
        counts = f"{answer.statistics.steps} steps, {answer.statistics.tokens_per_forward:.2f} tokens per forward pass"
        thought = Text(f"{answer.reasoning}\n\n" if answer.reasoning else "", style="dim")
        live.update(thought.append(f"{answer.text}\n", style="not dim").append(counts, style="dim"))


@click.command(cls=GroupedCommand, short_help="Ask several questions about the same videos and images.")
@click.argument("media", nargs=-1, required=True, metavar="MEDIA...")
@click.option("--show", is_flag=True, help="Draw the answers denoising live.")
@setting_options(GenerationSettings, "Decoding", only=("reuse",))
@setting_options(Fetching, "Limits")
@answer_options
@model_option
@one_line_errors
def chat(media: tuple[str, ...], show: bool, source: ModelSource, **options: Any) -> None:
    """Ask several questions about videos and images, one a line; an empty line or the end of input closes.

    MEDIA are as for `vidlada ask`, decoded and encoded once. Models trained on conversations also see the earlier
    turns. A question that is refused ends nothing but itself; the exit code is 2 if there was one.
    """
    _, conversation = watch(media, source, options, several=True)
    counts = f"{len(conversation.times)} frames"
    click.echo(f"{', '.join(media)}: {counts}. Ask; an empty line ends.", err=True)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes in no encoding are refused like any half character
    refused = False
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        question = sys.stdin.readline().strip()
        if not question:
            sys.exit(2 if refused else 0)
        try:
            if show:
                show_drafts(conversation, question)
            else:
                click.echo(conversation.ask(question).text)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            refused = True
