"""`vidlada ask` and `vidlada chat`."""

import json
import sys
from typing import Any

import click

from vidlada.cli.options import (
    GroupedCommand,
    ModelSource,
    answer_options,
    given_options,
    model_option,
    one_line_errors,
    progress,
    setting_options,
)
from vidlada.generation import GenerationSettings


@click.command(cls=GroupedCommand)
@click.argument("video", type=click.Path())
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: answer, model, frames, statistics.")
@click.option("--show", is_flag=True, help="Draw the answer denoising live.")
@click.option("--choices", help="Answers to choose from, with commas between them: the likeliest is printed.")
@answer_options
@model_option
@one_line_errors
def ask(
    video: str, question: str, as_json: bool, show: bool, choices: str | None, source: ModelSource, **options: Any
) -> None:
    """Ask VIDEO a QUESTION and print the answer.

    VIDEO is a video file, a folder of images, or an image.
    """
    if as_json and show:
        raise click.UsageError("--json and --show exclude each other")
    if show and choices:
        raise click.UsageError("--choices and --show exclude each other: choosing decodes nothing")
    given = given_options(options)
    vidlada = source.load()
    with progress(f"watching {video}"):
        conversation = vidlada.chat(video, **given)
    if show:
        show_drafts(conversation, question)
    else:
        with progress("denoising"):
            conversation.ask(question, choices and [choice.strip() for choice in choices.split(",")])
    answer = conversation.last
    if as_json:
        click.echo(json.dumps(answer_object(vidlada.name, video, question, conversation), ensure_ascii=False))
    elif not show:
        click.echo(answer.text)


def answer_object(model: str, video: str, question: str, conversation: Any) -> dict[str, Any]:
    """What `--json` prints."""
    answer = conversation.last
    chosen = {} if answer.choices is None else {"choices": answer.choices}
    return {
        "answer": answer.text,
        **chosen,
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


@click.command(cls=GroupedCommand)
@click.argument("video", type=click.Path())
@click.option("--show", is_flag=True, help="Draw the answers denoising live.")
@setting_options(GenerationSettings, "Decoding", only=("reuse",))
@answer_options
@model_option
@one_line_errors
def chat(video: str, show: bool, source: ModelSource, **options: Any) -> None:
    """Ask VIDEO several questions, one a line; an empty line or the end of input closes.

    The video is decoded and encoded once. Models trained on conversations also see the earlier turns.
    """
    given = given_options(options)
    vidlada = source.load()
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
