"""`vidlada batch`."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from vidlada.cli.options import (
    GroupedCommand,
    ModelSource,
    answer_options,
    given_options,
    model_option,
    one_line_errors,
)
from vidlada.errors import InputError


@click.command(cls=GroupedCommand, short_help="Answer a file of questions.")
@click.argument("questions", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Answers; a run that was ended goes on where it stopped.")
@click.option("--videos", type=click.Path(), help="Folder that paths start from; that of QUESTIONS by default.")
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Answers denoised together.")
@click.option("--ray", is_flag=True, help="Work on the Ray cluster of $RAY_ADDRESS, or on one started here.")
@click.option("--workers", type=click.IntRange(1), help="With --ray: models; as many as there are GPUs by default.")
@answer_options
@model_option
@one_line_errors
def batch(
    questions: str, out: str, videos: str | None, concurrency: int, ray: bool, workers: int | None,
    source: ModelSource, **options: Any,
) -> None:  # fmt: skip
    """Answer QUESTIONS, a file of JSON lines, into another: one line out for every line in, in order.

    A line is an object with "question", "video" and "image" (a path or an http(s) address, a list of such, or none;
    images are shown first), optionally with "id" and settings of its own, named as the options: {"id": 7, "video":
    "talk.mp4", "question": "Who speaks?", "gen_length": 64}. What cannot be answered gives a line with "error". The
    exit code is 1 if the whole output has such a line, earlier runs' included.
    """
    try:
        from vidlada.batch.local import Answerer, answer_all, open_output, read_lines
    except ImportError as error:
        raise InputError(f"batches need more packages: pip install 'vidlada[serve]' ({error.name})") from error
    if workers is not None and not ray:
        raise InputError("--workers are those of a cluster; add --ray")
    given = given_options(options)
    folder = Path(videos) if videos is not None else Path(questions).parent
    with readable(questions) as file, open_output(Path(out)) as output:
        lines = read_lines(file)
        output.resume(lines)
        done = output.written
        if ray:
            from vidlada.batch.ray_data import answer_on_cluster
            from vidlada.model.hub import SHIPPED, model_folder

            if source.model != SHIPPED:
                source = replace(source, model=str(model_folder(source.model).absolute()))
            rest, folder = list(lines), folder.absolute()
            answer_on_cluster(source.load, rest, folder, given, concurrency, workers, output.write)
        else:
            answerer = Answerer(source.load(), folder, given, concurrency)
            asyncio.run(answer_all(answerer, lines, 2 * concurrency, output.write))
    counts = (
        f"{output.written - done} lines answered, {done} before; {output.failed} of all {output.written} are errors"
    )
    click.echo(counts, err=True)
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
