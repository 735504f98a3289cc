"""`vidlada eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import GroupedCommand, GroupedOption, ModelSource, model_option, one_line_errors
from vidlada.errors import InputError
from vidlada.generation import SPEEDS
from vidlada.video import Sampling

SHAPES_CLIPS = 24


@click.group("eval")
def evaluate() -> None:
    """Benchmarks with lmms-eval: what data is there, runs, reports, comparisons."""


def tasks_option(default: str | None = None) -> Callable[..., Any]:
    """Which benchmarks."""
    return click.option(
        "--tasks", default=default, show_default=default is not None, cls=GroupedOption, group="Common",
        help="Comma-separated, e.g. videomme,mlvu_dev; paper stands for the published eight.",
    )  # fmt: skip


data_root_option = click.option(
    "--data-root", type=click.Path(path_type=Path), cls=GroupedOption, group="Common",
    help="Local copies in the published layout; HF_HOME by default.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@evaluate.command(cls=GroupedCommand)
@tasks_option("paper")
@data_root_option
@json_option
@one_line_errors
def check(tasks: str, data_root: Path | None, as_json: bool) -> None:
    """Say what data is there, what is missing, and how to get it."""
    from vidlada.evaluation import data
    from vidlada.evaluation.benchmarks import select_benchmarks

    benchmarks, root = select_benchmarks(tasks), data.data_root(data_root)
    found = data.check(root, benchmarks)
    click.echo(json.dumps(data.check_dict(root, found)) if as_json else data.check_table(root, benchmarks, found))


@evaluate.command(cls=GroupedCommand)
@tasks_option()
@data_root_option
@json_option
@one_line_errors
def download(tasks: str | None, data_root: Path | None, as_json: bool) -> None:
    """Fetch what is missing from the Hugging Face hub into the data root, and check it."""
    from vidlada.evaluation import data
    from vidlada.evaluation.benchmarks import select_benchmarks
    from vidlada.evaluation.download import download as fetch_missing

    benchmarks, root = select_benchmarks(require_tasks(tasks)), data.data_root(data_root)
    for benchmark in benchmarks:
        if benchmark.name != "shapes":  # which is written, not fetched
            click.echo(f"fetching what is missing of {benchmark.repository} into {root}", err=True)
            fetch_missing(root, benchmark)
    found = data.check(root, benchmarks)
    click.echo(json.dumps(data.check_dict(root, found)) if as_json else data.check_table(root, benchmarks, found))


def require_tasks(tasks: str | None) -> str:
    """The tasks, which have to be given."""
    if tasks is None:
        raise InputError("give --tasks, e.g. --tasks videomme,mlvu_dev, or --tasks paper for the published eight")
    return tasks


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a run besides tasks, data and model."""
    for group, names, settings in reversed((
        ("Common", ("--output",),
         {"type": click.Path(path_type=Path), "help": "Run folder; an interrupted run in it continues."}),
        ("Common", ("--preset",),
         {"type": click.Choice(["paper", "task"]), "default": "paper", "show_default": True,
          "help": "The published settings, or those each task of lmms-eval names."}),
        ("Common", ("--batch-size",),
         {"type": click.IntRange(1), "default": 1, "show_default": True, "help": "Questions answered together."}),
        ("Common", ("--processes",),
         {"type": click.IntRange(1), "default": 1, "show_default": True,
          "help": "One for each GPU; each takes a share of the samples."}),
        ("Common", ("--limit",),
         {"type": click.IntRange(1), "help": "Only the first samples of each task; for trying things out."}),
        ("Common", ("--skip-missing",),
         {"is_flag": True, "help": "Leave out tasks and questions whose data is missing; the report lists them."}),
        ("Video", ("--frames",),
         {"type": click.IntRange(1), "help": f"Most frames to take; {Sampling.max_frames} by default."}),
        ("Video", ("--fps",),
         {"type": click.FloatRange(0, min_open=True),
          "help": f"Candidate frames a second; {Sampling.fps:g} by default."}),
        ("Video", ("--force-sample",), {"is_flag": True, "help": "Always take --frames frames, evenly spaced."}),
        ("Prompt", ("--time-instruction/--no-time-instruction",),
         {"default": None, "help": "Tell the model when its frames were taken; by default to MVBench only."}),
        ("Decoding", ("--cache",), {"help": "Reuse between steps: none, dual, mars …, settings after a colon."}),
        ("Decoding", ("--commit",), {"help": "Which proposals become final in a step, e.g. credit:decay=0.8."}),
        ("Decoding", ("--speed",),
         {"type": click.Choice(list(SPEEDS)), "help": "Chooses cache and commit rule where they are not given."}),
        ("Decoding", ("--threshold",),
         {"type": float, "help": "Commit every token more confident than this, instead of fixed steps."}),
        ("Decoding", ("--gen", "generation"),
         {"multiple": True, "metavar": "NAME=VALUE",
          "help": "Any other generation argument, e.g. gen_length=32; may be repeated."}),
        ("Model", ("--adapter",),
         {"type": click.Path(path_type=Path), "help": "Folder or hub name of a LoRA adapter for --model."}),
        ("Output", ("--submit",),
         {"is_flag": True, "help": "Send EgoSchema's answers to its public server instead of only writing them."}),
        ("Output", ("--shapes-clips",),
         {"type": click.IntRange(1), "help": f"Clips to write for the task shapes; {SHAPES_CLIPS} by default."}),
    )):  # fmt: skip
        command = click.option(*names, cls=GroupedOption, group=group, **settings)(command)
    return command


@evaluate.command(cls=GroupedCommand)
@tasks_option()
@data_root_option
@run_options
@json_option
@model_option
@one_line_errors
def run(
    tasks: str | None, output: Path | None, data_root: Path | None, as_json: bool, shapes_clips: int | None,
    processes: int, submit: bool, skip_missing: bool, source: ModelSource, adapter: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Evaluate a model on benchmarks, and report.

    Scores are percent with standard errors, beside the paper's. The run folder gets report.md, report.json, report.png
    and answers.jsonl.
    """
    from vidlada.evaluation import data
    from vidlada.evaluation import run as running
    from vidlada.evaluation.benchmarks import UNSENT, select_benchmarks
    from vidlada.evaluation.report import write_report
    from vidlada.evaluation.results import read_run
    from vidlada.evaluation.submission import submit as submit_answers

    benchmarks, root = select_benchmarks(require_tasks(tasks)), data.data_root(data_root)
    if submit and (options["limit"] is not None or all(benchmark.name != UNSENT for benchmark in benchmarks)):
        raise InputError(f"--submit sends the answers of the whole task {UNSENT}; put it in --tasks, leave --limit out")
    if output is None:
        raise InputError("give --output, a folder for this run")
    settings = run_settings(source, adapter, options)
    shapes = [benchmark for benchmark in benchmarks if benchmark.name == "shapes"]
    if shapes_clips is not None and not shapes:
        raise InputError("--shapes-clips is of the task shapes; put it in --tasks, or leave the option out")
    gaps = find_gaps(root, [benchmark for benchmark in benchmarks if benchmark not in shapes], skip_missing)
    if shapes:  # only now: a run that is refused leaves nothing behind
        prepare_shapes(root, shapes[0], shapes_clips)
        gaps |= find_gaps(root, shapes, skip_missing)
    running.run(benchmarks, settings, output, root, processes, gaps if skip_missing else None)
    if submit:
        write_report(read_run(output))  # stays if the server does not answer
        submit_answers(output)
    print_report(output, as_json)


def run_settings(source: ModelSource, adapter: Path | None, options: dict[str, Any]) -> Any:
    """The options as settings of a run."""
    import yaml

    from vidlada.evaluation.run import RunSettings
    from vidlada.model.hub import model_folder

    model = {
        "adapter": None if adapter is None else str(model_folder(adapter, what="adapter").absolute()),
        "max_frames_num": options["frames"], "video_fps": options["fps"],
        "force_sample": options["force_sample"] or None, "add_time_instruction": options["time_instruction"],
        "cache": options["cache"], "commit": options["commit"], "speed": options["speed"],
        "threshold": options["threshold"], "device": source.device,
        "dtype": None if source.dtype == "auto" else source.dtype, "quantization": source.quantization,
        "compiled": source.compiled or None,
    }  # fmt: skip
    generation = {}
    for given in options["generation"]:
        name, sign, value = given.partition("=")
        if not sign or not name or "," in given:
            raise InputError(f"--gen takes name=value, not {given!r}")
        try:
            generation[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--gen {given!r}: the value cannot be read") from error
    return RunSettings(
        source.model,
        options["preset"],
        {name: value for name, value in model.items() if value is not None},
        generation,
        options["batch_size"],
        options["limit"],
    )


def prepare_shapes(root: Path, shapes: Any, clips: int | None) -> None:
    """Write the clips of the task `shapes`, where they are not there."""
    from vidlada.evaluation.data import repository_folder
    from vidlada.evaluation.shapes_data import count_clips, write_shapes

    folder = repository_folder(root, shapes.repository)
    if folder is None:
        click.echo(f"writing {clips or SHAPES_CLIPS} clips to {root / shapes.folder}", err=True)
        write_shapes(root, clips or SHAPES_CLIPS)
    elif clips is not None and clips != (there := count_clips(folder)):
        raise InputError(
            f"--shapes-clips {clips}: {there} clips are in {folder}, which are used; leave the option out, or give "
            "another data root"
        )


def find_gaps(root: Path, benchmarks: list[Any], skip: bool) -> dict[str, Any]:
    """What the tasks lack, with a line for each.

    Raises:
        InputError: a task has no questions or no video at all, and is not to be skipped.
    """
    from vidlada.evaluation import data

    gaps = data.find_gaps(root, benchmarks)
    consequence = "are left out" if skip else "will count as failed"
    for benchmark in benchmarks:
        for task, gap in ((task.name, gaps[task.name]) for task in benchmark.tasks if task.name in gaps):
            if gap.problem and not skip:
                raise InputError(
                    f"{task}: {gap.problem}; {data.how_to_get(root, benchmark)}; or leave out what is missing with "
                    "--skip-missing"
                )
            if gap.problem:
                click.echo(f"{task} is left out: {gap.problem}", err=True)
            else:
                click.echo(f"{task}: {len(gap.videos)} of its videos are missing (e.g. {gap.videos[0]}); their "
                           f"questions {consequence}", err=True)  # fmt: skip
    return gaps


@evaluate.command(cls=GroupedCommand)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@json_option
@one_line_errors
def report(folder: Path, as_json: bool) -> None:
    """Write the report of the run folder RUN anew, and print it."""
    print_report(folder, as_json)


def print_report(folder: Path, as_json: bool) -> None:
    """Write a run's report and print it."""
    from vidlada.evaluation.report import report_dict, report_text, write_report
    from vidlada.evaluation.results import read_run

    finished = read_run(folder)
    written = write_report(finished)
    click.echo(json.dumps(report_dict(finished)) if as_json else report_text(finished))
    click.echo("written: " + ", ".join(map(str, written)), err=True)


@evaluate.command(cls=GroupedCommand)
@click.argument("folders", metavar="RUN RUN...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write the comparison into, with a plot.")
@json_option
@one_line_errors
def compare(folders: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Set finished runs side by side, the first against the others, over the samples both have."""
    from vidlada.evaluation.compare import compare_runs, compare_text, write_comparison
    from vidlada.evaluation.results import read_run

    runs = [read_run(folder) for folder in folders]
    compared = compare_runs(runs)
    click.echo(json.dumps(compared) if as_json else compare_text(compared))
    if output is not None:
        click.echo("written: " + ", ".join(map(str, write_comparison(compared, runs, output))), err=True)
