"""`vidlada train`."""

from pathlib import Path

import click

from vidlada.cli.options import one_line_errors, without_progress_bars


@click.command()
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
