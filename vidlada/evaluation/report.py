"""One report of a run: Markdown, JSON and a plot; and runs side by side."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.evaluation.results import BenchmarkResult, Run, Sample, Score, mean_score, score_of
from vidlada.markdown import table

FAILURES_SHOWN = 20
REPORT_FILES = ("report.md", "report.json", "report.png")
COMPARISON_FILES = ("comparison.md", "comparison.json", "comparison.png")


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:+.1f}"


def plain(value: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return None if value is None or math.isnan(value) else round(value, 4)


def score_object(score: Score) -> dict[str, Any]:
    """A score for JSON."""
    return {"percent": plain(score.percent), "standard_error": plain(score.standard_error), "number": score.number}


def is_partial(run: Run, result: BenchmarkResult) -> bool:
    """Whether a score leaves something of its benchmark out."""
    few = any(
        task.expected and sum(sample.task == task.name for sample in result.samples) < task.expected
        for task in result.benchmark.tasks
    )
    return few or bool(result.absent) or run.about["settings"]["limit"] is not None


def difference(run: Run, result: BenchmarkResult) -> float | None:
    """Of our score and the paper's, where both are of the whole benchmark."""
    paper = result.benchmark.paper
    return None if paper is None or is_partial(run, result) else result.score.percent - paper


def report_object(run: Run) -> dict[str, Any]:
    """The whole report as plain values."""
    return {
        "run": run.about,
        "benchmarks": {name: benchmark_object(run, result) for name, result in run.results.items()},
        "cost": cost(run),
    }


def benchmark_object(run: Run, result: BenchmarkResult) -> dict[str, Any]:
    """One benchmark as plain values."""
    benchmark, score = result.benchmark, result.score
    return {
        "title": benchmark.title,
        **score_object(score),
        "mean_over": benchmark.mean,
        "paper": benchmark.paper,
        "difference": plain(difference(run, result)),
        "partial": is_partial(run, result),
        "failed": [
            {"task": s.task, "doc_id": s.doc_id, "video": s.video, "error": s.error} for s in result.failed
        ],
        "without_letter": result.without_letter,
        "absent": list(result.absent),
        "lmms_eval": result.lmms_eval,
        "tasks": {task: score_object(each) for task, each in result.tasks.items()},
        "kinds": {kind: score_object(each) for kind, each in result.kinds.items()},
    }  # fmt: skip


def cost(run: Run) -> dict[str, Any]:
    """What the answers took, over samples with a record."""
    noted = [s for s in run.samples.values() if s.seconds is not None and s.error is None]
    seconds, tokens = sum(s.seconds or 0 for s in noted), sum(s.tokens or 0 for s in noted)
    return {
        "samples": len(noted),
        "seconds": round(seconds, 2),
        "seconds_per_sample": plain(seconds / len(noted)) if noted else None,
        "tokens": tokens,
        "tokens_per_second": plain(tokens / seconds) if seconds else None,
        "forward_passes": sum(s.forward_passes or 0 for s in noted),
    }


def report_text(run: Run) -> str:
    """The report in Markdown."""
    settings = run.about["settings"]
    lines = [f"# {settings['model']}", ""]
    rows, notes = [], []
    for result in run.results.values():
        score, paper = result.score, result.benchmark.paper
        mark, gain = " *" if is_partial(run, result) else "", signed(difference(run, result))
        rows.append(
            (result.benchmark.title + mark, len(result.samples), number(score.percent), number(score.standard_error),
             number(paper), gain, len(result.failed), number(result.without_letter, 0))
        )  # fmt: skip
        if result.absent:
            notes.append(f"{result.benchmark.title} lacks {', '.join(result.absent)}: the mean is over the others.")
    if any(is_partial(run, result) for result in run.results.values()):
        notes.insert(0, "\\* not the whole benchmark; not comparable with the paper.")
    if settings["limit"] is not None:
        notes.append(f"Only the first {settings['limit']} samples of each task were asked.")
    lines += table(
        ("benchmark", "samples", "score", "standard error", "paper", "difference", "failed", "no letter"), rows
    )
    lines += [
        "",
        "Scores are percent, 0 to 100. Standard errors take the questions about one video as dependent. Failed samples "
        "count as wrong. Paper: VidLaDA-8B at 64 frames, arXiv 2601.17868; a dash where its figure is not known here. "
        "No letter: answers that choose none, by one reader for all benchmarks; a task may have drawn one at random.",
        *notes,
    ]
    for result in run.results.values():
        lines += ["", *detail_lines(result)]
    lines += ["", *failure_lines(run), "## Cost", "", *cost_lines(labels([str(run.folder)]), [cost(run)])]
    lines += ["", "## Settings", "", *settings_lines(run)]
    return "\n".join(lines) + "\n"


def detail_lines(result: BenchmarkResult) -> list[str]:
    """Scores of tasks and question types, absent ones named, beside what lmms-eval printed."""
    rows: list[tuple[object, ...]] = [
        (name, score.number, number(score.percent), number(score.standard_error), printed)
        for parts, printed_of in ((result.tasks, result.lmms_eval), (result.kinds, None))
        for name, score in parts.items()
        for printed in ["" if printed_of is None else number(printed_of.get(name))]
    ]
    rows += [(name, "absent", "–", "–", "") for name in result.absent]
    head = ("part", "samples", "score", "standard error", "lmms-eval")
    return [f"## {result.benchmark.title}", "", *table(head, rows)]


def failure_lines(run: Run) -> list[str]:
    """Samples that failed, and why."""
    failed = [sample for result in run.results.values() for sample in result.failed]
    if not failed:
        return []
    lines = [f"## Failed: {len(failed)}", ""]
    lines += [f"- {s.task} {s.doc_id}: {s.error}" for s in failed[:FAILURES_SHOWN]]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"- and {len(failed) - FAILURES_SHOWN} more, in report.json")
    return [*lines, ""]


def cost_lines(names: Sequence[str], costs: Sequence[dict[str, Any]]) -> list[str]:
    """What runs took."""
    rows = [
        (name, took["samples"], number(took["seconds_per_sample"], 3), number(took["tokens_per_second"]),
         took["forward_passes"])
        for name, took in zip(names, costs, strict=True)
    ]  # fmt: skip
    return table(("run", "samples timed", "seconds a sample", "tokens a second", "forward passes"), rows)


def settings_lines(run: Run) -> list[str]:
    """Everything a score depends on."""
    about = run.about
    settings = {name: listed(value) for name, value in about["settings"].items()}
    lines = [f"- {name}: {value}" for name, value in settings.items() if value]
    for kind in ("model", "generation"):
        shared: dict[str, list[str]] = {}
        for name, arguments in about["arguments"].items():
            shared.setdefault(listed(arguments[kind]) or "the task’s own", []).append(name)
        lines += [f"- {kind} of {', '.join(names)}: {values}" for values, names in shared.items()]
    return [*lines, f"- versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"]


def listed(value: Any) -> str:
    """A setting, or a group of them; nothing where none was given."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return "" if value is None else str(value)


def write_report(run: Run) -> list[Path]:
    """Write the report into the run folder; the plot only where matplotlib is installed."""
    text, data, plot = (run.folder / name for name in REPORT_FILES)
    text.write_text(report_text(run), encoding="utf-8")
    data.write_text(json.dumps(report_object(run), indent=1, ensure_ascii=False), encoding="utf-8")
    return [text, data, *drawn([run], plot)]


def labels(folders: Sequence[str]) -> list[str]:
    """Of run folders: their names, or their whole paths where names are shared."""
    names = {folder: Path(folder).absolute().name for folder in folders}
    unique = len(set(names.values())) == len(names)
    return [names[folder] if unique else folder for folder in folders]


def drawing(runs: Sequence[Run]) -> Any:
    """Scores of runs with two standard errors, where those are known, and the paper's as lines: a Figure."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.results))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(names) * len(runs)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(runs)
    for place, (run, label) in enumerate(zip(runs, labels([str(run.folder) for run in runs]), strict=True)):
        results = [run.results.get(name) for name in names]
        scores = [result.score if result else Score(math.nan, math.nan, 0) for result in results]
        heights = [row + (place - (len(runs) - 1) / 2) * height for row in range(len(names))]
        errors = [2 * score.standard_error for score in scores]
        axes.barh(heights, [score.percent for score in scores], height, xerr=errors, label=label, capsize=2)
        for middle, score in zip(heights, scores, strict=True):
            axes.text(1.01, middle, number(score.percent), transform=axes.get_yaxis_transform(), va="center")
    known = {name: next(run.results[name] for run in runs if name in run.results).benchmark for name in names}
    label = "paper, 8B"
    for row, name in enumerate(names):
        paper = known[name].paper
        if paper is not None:
            axes.vlines(paper, row - 0.45, row + 0.45, colors="black", label=label)
            label = "_"
    partial = {name for run in runs for name, result in run.results.items() if is_partial(run, result)}
    axes.set_yticks(range(len(names)), [known[name].title + " *" * (name in partial) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    note = "\n* not the whole benchmark, not comparable with the paper" if partial else ""
    axes.set_xlabel(f"score, %; bars of two standard errors{note}")
    figure.legend(loc="outside upper center", ncols=len(runs) + 1)
    return figure


def exact_mcnemar(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least so uneven among samples where two runs differ, if both were alike."""
    total, least = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, i) for i in range(least + 1)) / 2**total
    return min(1.0, 2 * tail)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Every run against the first, over the samples both have.

    Raises:
        InputError: fewer than two runs, or one that has nothing in common with the first.
    """
    if len(runs) < 2:
        raise InputError("a comparison needs at least two runs")
    first, compared = runs[0], []
    for other in runs[1:]:
        pairs = {name: paired(first, other, name) for name in first.results}
        pairs = {name: both for name, both in pairs.items() if both}
        rows: list[tuple[str | None, str, list[tuple[Sample, Sample]]]]
        if not pairs:
            raise InputError(f"{other.folder} has no judged samples in common with {first.folder}")
        rows = [(name, first.results[name].benchmark.title, both) for name, both in pairs.items()]
        if len(rows) > 1:
            rows.append((None, "all samples", [pair for both in pairs.values() for pair in both]))
        compared += [{"run": str(other.folder), "benchmark": name, "title": title, **compare_pairs(both)}
                     for name, title, both in rows]  # fmt: skip
    return {
        "runs": [str(run.folder) for run in runs],
        "compared": compared,
        "differing": differing(runs),
        "cost": [cost(run) for run in runs],
    }


def paired(first: Run, other: Run, name: str) -> list[tuple[Sample, Sample]]:
    """Judged samples of a benchmark that both runs have."""
    if name not in other.results:
        return []
    theirs = {sample.key: sample for sample in other.results[name].samples if sample.points is not None}
    ours = (sample for sample in first.results[name].samples if sample.points is not None)
    return [(sample, theirs[sample.key]) for sample in ours if sample.key in theirs]


def compare_pairs(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """Scores of both, and the paired difference."""
    gains = [(b.points or 0.0) - (a.points or 0.0) for a, b in pairs]
    gain = mean_score(gains, [a.cluster for a, _ in pairs])
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return {
        "number": len(pairs),
        "baseline_percent": plain(score_of([a for a, _ in pairs]).percent),
        "percent": plain(score_of([b for _, b in pairs]).percent),
        "difference": plain(gain.percent), "standard_error": plain(gain.standard_error),
        "better": better, "worse": worse, "p": exact_mcnemar(better, worse),
    }  # fmt: skip


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings and versions that are not the same in all runs, with the value in each."""
    values = [
        {**run.about["settings"], **run.about["settings"]["model_arguments"],
         **run.about["settings"]["generation_arguments"], **run.about["versions"]} for run in runs
    ]  # fmt: skip
    names = [
        name for name in dict.fromkeys(name for each in values for name in each) if not name.endswith("_arguments")
    ]
    found = {name: [listed(each.get(name)) or "–" for each in values] for name in names}
    return {name: each for name, each in found.items() if len(set(each)) > 1}


def compare_text(compared: dict[str, Any]) -> str:
    """A comparison in Markdown."""
    names = labels(compared["runs"])
    name_of = dict(zip(compared["runs"], names, strict=True))
    rows = [
        (row["title"], row["number"], number(row["baseline_percent"]), name_of[row["run"]], number(row["percent"]),
         signed(row["difference"]), number(row["standard_error"]), f"{row['better']} / {row['worse']}",
         f"{row['p']:.3g}")
        for row in compared["compared"]
    ]  # fmt: skip
    head = ("benchmark", "samples", names[0], "run", "score", "difference", "standard error", "better / worse", "p")
    lines = table(head, rows)
    lines += ["", "Over the samples both runs have, every one counting alike. p: exact McNemar test, two-sided, which "
              "takes samples as independent; the standard error does not."]  # fmt: skip
    lines += ["", *cost_lines(names, compared["cost"]), ""]
    if compared["differing"]:
        lines += table(("differing", *names), [(name, *values) for name, values in compared["differing"].items()])
    return "\n".join(lines) + "\n"


def write_comparison(compared: dict[str, Any], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write what `compare` found into a folder; the plot only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data, plot = (folder / name for name in COMPARISON_FILES)
    text.write_text(compare_text(compared), encoding="utf-8")
    data.write_text(json.dumps(compared, indent=1, ensure_ascii=False), encoding="utf-8")
    return [text, data, *drawn(runs, plot)]


def drawn(runs: Sequence[Run], path: Path) -> list[Path]:
    """The plot, unless matplotlib is missing."""
    try:
        drawing(runs).savefig(path)
    except ImportError:
        return []
    return [path]
