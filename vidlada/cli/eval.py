"""`vidlada eval`."""

import json
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import ModelSource, model_option, one_line_errors
from vidlada.errors import InputError


@click.command("eval")
@click.option("--tasks", help="Comma-separated, e.g. videomme,mlvu_dev; paper stands for the published eight.")
@click.option("--output", type=click.Path(path_type=Path), help="Run folder; an interrupted run in it continues.")
@click.option(
    "--data-root", type=click.Path(path_type=Path), help="Local copies in the published layout; HF_HOME by default."
)
@click.option(
    "--check", "only_check", is_flag=True, help="Only say what data is there, what is missing, how to get it."
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "task"]),
    default="paper",
    show_default=True,
    help="The published settings, or those each task of lmms-eval names.",
)
@click.option("--frames", type=click.IntRange(1), help="Most frames to take; 64 by default.")
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Candidate frames a second; 1 by default.")
@click.option("--force-sample", is_flag=True, help="Always take --frames frames, evenly spaced.")
@click.option(
    "--time-instruction/--no-time-instruction",
    default=None,
    help="Tell the model when its frames were taken; by default to MVBench only.",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder or hub name of a LoRA adapter for --model.")
@click.option("--cache", help="Reuse between steps: none, dual, mars …, settings after a colon.")
@click.option("--threshold", type=float, help="Commit every token at least this confident, instead of fixed steps.")
@click.option(
    "--gen",
    "generation",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other generation argument, e.g. gen_length=32; may be repeated.",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Questions answered together.")
@click.option("--limit", type=click.IntRange(1), help="Only the first samples of each task; for trying things out.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="One for each GPU; each takes a share of the samples.",
)
@click.option(
    "--download", is_flag=True, help="First fetch what is missing from the Hugging Face hub into the data root."
)
@click.option(
    "--submit", is_flag=True, help="Send EgoSchema's answers to its public server instead of only writing them."
)
@click.option(
    "--compare",
    "compared",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Instead: finished runs side by side, also written into --output; twice or more, the baseline first.",
)
@click.option(
    "--shapes-clips",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Clips written for the task shapes, where its data is not there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_option
@one_line_errors
def evaluate(
    tasks: str | None, output: Path | None, data_root: Path | None, only_check: bool, compared: tuple[Path, ...],
    as_json: bool, shapes_clips: int, processes: int, download: bool, submit: bool,
    source: ModelSource, adapter: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Evaluate a model on benchmarks with lmms-eval, and report.

    Scores are percent with standard errors, beside the paper's; report.md, report.json and report.png are written into
    the run folder.
    """
    from vidlada.evaluation import data
    from vidlada.evaluation.benchmarks import UNSENT, chosen

    if compared:
        print_comparison(compared, output, as_json)
        return
    if tasks is None:
        raise InputError("give --tasks, e.g. --tasks videomme,mlvu_dev, or --tasks paper for the published eight")
    benchmarks = chosen(tasks)
    root = data.data_root(data_root)
    if submit and (options["limit"] is not None or all(benchmark.name != UNSENT for benchmark in benchmarks)):
        raise InputError(f"--submit sends the answers of the whole task {UNSENT}; put it in --tasks, leave --limit out")
    if download:
        print_download(root, benchmarks)
    if only_check or (download and output is None):
        found = data.check(root, benchmarks)
        click.echo(json.dumps(data.check_object(root, found)) if as_json else data.check_table(root, benchmarks, found))
        return
    if output is None:
        raise InputError("give --output, a folder for this run")
    settings = run_settings(source, adapter, options)
    refuse_missing(root, benchmarks, shapes_clips)
    print_run(benchmarks, settings, output, root, as_json, processes, submit)


def print_comparison(folders: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Runs side by side."""
    from vidlada.evaluation.report import compare, compare_text, write_comparison
    from vidlada.evaluation.results import read_run

    runs = [read_run(folder) for folder in folders]
    compared = compare(runs)
    click.echo(json.dumps(compared) if as_json else compare_text(compared))
    if output is not None:
        click.echo("written: " + ", ".join(map(str, write_comparison(compared, runs, output))), err=True)


def print_download(root: Path, benchmarks: list[Any]) -> None:
    """Fetch what is missing of benchmarks that are on the hub."""
    from vidlada.evaluation.download import download

    for benchmark in benchmarks:
        if benchmark.name != "shapes":
            click.echo(f"fetching what is missing of {benchmark.repository} into {root}", err=True)
            download(root, benchmark)


def run_settings(source: ModelSource, adapter: Path | None, options: dict[str, Any]) -> Any:
    """The options as settings of a run."""
    import yaml

    from vidlada.evaluation.run import RunSettings
    from vidlada.loading import model_folder

    model = {
        "adapter": None if adapter is None else str(model_folder(adapter, what="adapter").absolute()),
        "max_frames_num": options["frames"], "video_fps": options["fps"],
        "force_sample": options["force_sample"] or None, "add_time_instruction": options["time_instruction"],
        "cache": options["cache"], "threshold": options["threshold"], "device": source.device,
        "dtype": None if source.dtype == "auto" else source.dtype, "quantization": source.quantization,
        "compiled": source.compiled or None,
    }  # fmt: skip
    generation = {}
    for given in options["generation"]:
        name, sign, value = given.partition("=")
        if not sign or not name or "," in given:
            raise InputError(f"--gen takes name=value, not {given!r}")
        generation[name] = yaml.safe_load(value)
    return RunSettings(
        source.model,
        options["preset"],
        {name: value for name, value in model.items() if value is not None},
        generation,
        options["batch_size"],
        options["limit"],
    )


def refuse_missing(root: Path, benchmarks: list[Any], shapes_clips: int) -> None:
    """Stop before anything is loaded where questions or all videos are missing; warn where some videos are; write the
    shapes world."""
    from vidlada.evaluation import data
    from vidlada.evaluation.shapes_data import write_shapes

    for benchmark in benchmarks:
        if benchmark.name == "shapes" and data.repository_folder(root, benchmark.repository) is None:
            click.echo(f"writing {shapes_clips} clips to {root / benchmark.folder}", err=True)
            write_shapes(root, shapes_clips)
        for found in (data.check_task(root, benchmark, task) for task in benchmark.tasks):
            problem = found.problem or (found.videos and len(found.missing) == found.videos and (
                f"none of its {found.videos} videos is below {root / benchmark.folder}"))  # fmt: skip
            if problem:
                raise InputError(f"{found.task.name}: {problem}; {data.how_to_get(root, benchmark)}")
            if found.missing:
                click.echo(f"{found.task.name}: {len(found.missing)} of {found.videos} videos are missing (e.g. "
                           f"{found.missing[0]}); their questions will count as failed", err=True)  # fmt: skip


def print_run(
    benchmarks: list[Any], settings: Any, output: Path, root: Path, as_json: bool, processes: int, submit: bool
) -> None:
    """Run, send what is to be sent, write the report, print it."""
    from vidlada.evaluation import submission
    from vidlada.evaluation.report import report_object, report_text, write_report
    from vidlada.evaluation.results import read_run
    from vidlada.evaluation.run import run

    run(benchmarks, settings, output, root, processes)
    if submit:
        write_report(read_run(output))  # stays if the server does not answer
        submission.submit(output)
    finished = read_run(output)
    written = write_report(finished)
    click.echo(json.dumps(report_object(finished)) if as_json else report_text(finished))
    click.echo("written: " + ", ".join(map(str, written)), err=True)
