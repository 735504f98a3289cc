"""`vidlada batch`."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from vidlada.cli.options import ModelSource, answer_options, given_options, model_option, one_line_errors
from vidlada.errors import InputError

REQUEST_OPTIONS = ("frames", "fps", "force_sample", "time_instruction", "system")  # the rest are of decoding


@click.command()
@click.argument("questions", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Answers; a run that was ended goes on where it stopped.")
@click.option("--videos", type=click.Path(), help="Folder that paths start from; that of QUESTIONS by default.")
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Answers denoised together.")
@answer_options
@model_option
@one_line_errors
def batch(questions: str, out: str, videos: str | None, concurrency: int, source: ModelSource, **options: Any) -> None:
    """Answer QUESTIONS, a file of JSON lines, into another: one line out for every line in, in order.

    A line is an object with "question", "video" (a path, or none), and if it likes "id" and settings of its own, named
    as the options: {"id": 7, "video": "talk.mp4", "question": "Who speaks?", "gen_length": 64}. What cannot be answered
    gives a line with "error", and exit code 1 in the end.
    """
    from vidlada.serve.batch import answer_all, opened, read_lines

    given = given_options(options)
    folder = Path(videos) if videos is not None else Path(questions).parent
    with readable(questions) as file, opened(Path(out)) as output:
        lines = read_lines(file)
        output.resume(lines)
        done = output.written
        vidlada = source.load()
        vidlada.settings(**{name: value for name, value in given.items() if name not in REQUEST_OPTIONS})
        asyncio.run(answer_all(vidlada, lines, folder, given, concurrency, output.write))
    click.echo(f"{output.written - done} lines answered, {output.failed} of them with errors; {done} before", err=True)
    sys.exit(1 if output.failed else 0)


@contextmanager
def readable(path: str) -> Iterator[BinaryIO]:
    """A file that may be missing."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 (what goes wrong later is not the opening's)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file
