"""`vidlada shapes`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import ModelSource, answer_options, given_options, model_option, one_line_errors, progress
from vidlada.errors import InputError
from vidlada.files import write_json


@click.group(short_help="Write and evaluate data of the shapes world.")
def shapes() -> None:
    """The synthetic world the shipped model was trained on: write its clips and questions, score a model."""


@shapes.command("write")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--clips", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first clip.")
@click.option("--questions", type=click.IntRange(0), default=10, show_default=True, help="Most short ones a clip.")
@click.option("--seconds", type=click.IntRange(2, 60), help="Length of every clip; drawn by default.")
@click.option("--size", type=click.IntRange(49), default=224, show_default=True, help="Pixels along a side, even.")
@click.option("--no-clock", is_flag=True, help="Leave out the running clock in the corner.")
@click.option("--shifted-clock", is_flag=True, help="Let the clock of every clip start at a random second.")
@click.option("--families", metavar="NAMES", help="Kinds of questions, e.g. at,when,clock; by default the benchmark's.")
@one_line_errors
def shapes_write(folder: Path, no_clock: bool, families: str | None, **options: Any) -> None:
    """Write H.264 clips and their questions, in the LLaVA json format, to FOLDER."""
    from vidlada.shapes.dataset import write_dataset

    if families is not None:
        options["families"] = [family.strip() for family in families.split(",")]
    with progress("writing clips"):
        click.echo(str(write_dataset(folder, clock=not no_clock, **options)))


@shapes.command("evaluate")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--blind", is_flag=True, help="Ask without the videos: what the questions give away by themselves.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write scores and every answer as JSON here.")
@answer_options
@model_option
@one_line_errors
def shapes_evaluate(questions: Path, blind: bool, report: Path | None, source: ModelSource, **options: Any) -> None:
    """Ask a model every question of QUESTIONS (from `vidlada shapes write`) and print its scores by family.

    Questions with choices are answered by the likeliest choice; how often the model names its letter when asked for
    one is a figure of its own.
    """
    from vidlada.shapes.benchmark import Asked, evaluate, read_questions

    entries = read_questions(questions)
    if report is not None and report.exists():
        raise InputError(f"{report} exists; choose another file")
    given = given_options(options)
    vidlada = source.load()

    videos: dict[Path | None, Any] = {}

    def answers(video: Path | None, pairs: Sequence[Asked]) -> list[str]:
        if video not in videos:
            videos.clear()
            videos[video] = vidlada.chat(video, **given).media
        about = [(videos[video], text) for text, _ in pairs]
        return [answer.text for answer in vidlada.ask_many(about, [choices for _, choices in pairs], **given)]

    def show(done: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{done} of {len(entries)} questions", nl=done == len(entries), err=True)

    result = evaluate(entries, questions.parent, answers, blind=blind, letters=True, progress=show)
    if report is not None:
        write_json(report, {"model": source.model, "blind": blind, **result.to_dict()})
    click.echo(result.to_markdown())
