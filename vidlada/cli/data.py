"""`vidlada data`."""

import json
import sys
from pathlib import Path

import click

from vidlada.cli.options import one_line_errors, progress


@click.group(short_help="Check and build training data.")
def data() -> None:
    """Training data: check a run's files, build questions about long videos."""


@data.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--most", type=click.IntRange(0), help="Lines of each kind of problem; by default all.")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Threads that open files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every finding.")
@one_line_errors
def check(config: Path, most: int | None, workers: int, as_json: bool) -> None:
    """Check the data of the run that CONFIG (YAML) describes: entries without a meaning, missing and unreadable files,
    samples that are too long or without labels, duplicate ids; and show how long samples are. The exit code is 1 if
    anything was found.
    """
    from vidlada.training.config import load_config
    from vidlada.training.data.llava import LlavaSource
    from vidlada.training.stages import evaluation_source, stage_sources

    settings = load_config(config)
    sources = [(stage.name, source) for stage, source in zip(settings.stages, stage_sources(settings), strict=True)]
    held_out = evaluation_source(settings)
    if held_out is not None:
        sources.append(("evaluation", held_out))
    # only now what imports torch
    from vidlada.training.data.check import check_source
    from vidlada.training.models import initial_processor

    processor = initial_processor(settings)
    reports = []
    for name, source in sources:
        if isinstance(source, LlavaSource):
            with progress(f"checking {name}"):
                reports.append(check_source(name, source, processor, workers))
        elif not as_json:
            click.echo(f"{name}: clips of the shapes world, made as they are needed")
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports]))
    for report in [] if as_json else reports:
        click.echo(report.text(most))
    sys.exit(0 if all(report.ok for report in reports) else 1)


@data.command()
@click.argument("config", type=click.Path(path_type=Path))
@one_line_errors
def build(config: Path) -> None:
    """Make questions about long videos as CONFIG (YAML) says: a model writes them, those answered without the video
    are dropped, and other models vote. Running it again continues.
    """
    from vidlada.data_engine.build import build_dataset, load_build

    click.echo(str(build_dataset(load_build(config), report=lambda line: click.echo(line, err=True))))
