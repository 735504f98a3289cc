"""`vidlada train`."""

import os
from pathlib import Path

import click

from vidlada.cli.options import one_line_errors, without_progress_bars


@click.command(short_help="Train a model as a YAML file says.")
@click.argument("config")
@click.option("--output", help="Folder of checkpoints, logs and the model, instead of the config's.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output folder.")
@click.option("--dry-run", is_flag=True, help="Check config and data files, print the schedule, train nothing.")
@one_line_errors
def train(config: str, output: str | None, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Train as CONFIG says: a YAML file, or the name of one in the package, e.g. tiny.

    An interrupted run continues with --resume, on the same curve.

    Several processes: torchrun --nproc-per-node N -m vidlada train CONFIG, or accelerate launch.
    """
    main_process = os.environ.get("RANK", "0") == "0"  # of those that a launcher started
    if main_process and not dry_run:  # before imports and data, which take their time
        click.echo(f"reading {config} and its data", err=True)
    from vidlada.errors import InputError
    from vidlada.training.config import load_config
    from vidlada.training.output import check_output
    from vidlada.training.stages import prepare_run, schedule

    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    run = prepare_run(load_config(config, output=output))
    if main_process and not dry_run:  # the others may come when it has begun to write
        check_output(Path(run.config.output), resume, overwrite)
    # only now what imports torch
    from vidlada.training.models import initial_config
    from vidlada.training.trainer import run_training

    if dry_run:
        initial_config(run.config)
        click.echo(schedule(run.config))
        return
    without_progress_bars()
    folder = run_training(run, resume=resume, overwrite=overwrite, report=lambda line: click.echo(line, err=True))
    if main_process:
        click.echo(str(folder))
