"""One report of a run: Markdown, JSON and a plot; and runs side by side."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.evaluation.results import BenchmarkResult, Run, Score, mean_score, score_of

FAILURES_SHOWN = 20
REPORT_FILES = ("report.md", "report.json", "report.png")


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:+.1f}"


def plain(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def score_object(score: Score) -> dict[str, Any]:
    """A score for JSON."""
    return {"percent": plain(score.percent), "standard_error": plain(score.standard_error), "number": score.number}


def is_partial(run: Run, result: BenchmarkResult) -> bool:
    """Whether a score leaves something of its benchmark out."""
    return bool(result.absent) or run.about["settings"]["limit"] is not None


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
        "difference": None if benchmark.paper is None else plain(score.percent - benchmark.paper),
        "partial": is_partial(run, result),
        "failed": [
            {"task": s.task, "doc_id": s.doc_id, "video": s.video, "error": s.error} for s in result.failed
        ],
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
    lines += [
        "| benchmark | samples | score | standard error | paper | difference | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in run.results.values():
        score, paper = result.score, result.benchmark.paper
        mark = " *" if is_partial(run, result) else ""
        difference = None if paper is None else score.percent - paper
        lines.append(
            f"| {result.benchmark.title}{mark} | {len(result.samples)} | {number(score.percent)} "
            f"| {number(score.standard_error)} | {number(paper)} | {signed(difference)} | {len(result.failed)} |"
        )
        if result.absent:
            notes.append(f"{result.benchmark.title} lacks {', '.join(result.absent)}: the mean is over the others.")
    if any(is_partial(run, result) for result in run.results.values()):
        notes.insert(0, "\\* not the whole benchmark; not comparable with the paper.")
    if settings["limit"] is not None:
        notes.append(f"Only the first {settings['limit']} samples of each task were asked.")
    lines += [
        "",
        "Scores are percent, 0 to 100. Standard errors take the questions about one video as dependent. Failed samples "
        "count as wrong. Paper: VidLaDA-8B at 64 frames, arXiv 2601.17868; a dash where its figure is not known here.",
        *notes,
    ]
    for result in run.results.values():
        lines += ["", *detail_lines(result)]
    lines += ["", *failure_lines(run), "## Cost", "", *cost_lines([run]), "", "## Settings", "", *settings_lines(run)]
    return "\n".join(lines) + "\n"


def detail_lines(result: BenchmarkResult) -> list[str]:
    """Scores of tasks and question types, absent ones named, beside what lmms-eval printed."""
    lines = [
        f"## {result.benchmark.title}",
        "",
        "| part | samples | score | standard error | lmms-eval |",
        "|---|---|---|---|---|",
    ]
    for name, score in result.tasks.items():
        lines.append(f"| {name} | {_cells(score)} | {number(result.lmms_eval.get(name))} |")
    lines += [f"| {name} | {_cells(score)} | |" for name, score in result.kinds.items()]
    lines += [f"| {name} | absent | – | – | |" for name in result.absent]
    return lines


def _cells(score: Score) -> str:
    return f"{score.number} | {number(score.percent)} | {number(score.standard_error)}"


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


def cost_lines(runs: Sequence[Run]) -> list[str]:
    """What runs took."""
    lines = ["| run | samples timed | seconds a sample | tokens a second | forward passes |", "|---|---|---|---|---|"]
    for run in runs:
        took = cost(run)
        lines.append(
            f"| {run.folder.name} | {took['samples']} | {number(took['seconds_per_sample'], 3)} "
            f"| {number(took['tokens_per_second'])} | {took['forward_passes']} |"
        )
    return lines


def settings_lines(run: Run) -> list[str]:
    """Everything a score depends on."""
    about = run.about
    lines = [f"- {name}: {value}" for name, value in about["settings"].items()]
    for name, arguments in about["arguments"].items():
        for kind, values in arguments.items():
            lines.append(f"- {name}, {kind}: {', '.join(f'{k}={v}' for k, v in values.items()) or 'the task’s own'}")
    return [*lines, f"- versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"]


def write_report(run: Run) -> list[Path]:
    """Write the report into the run folder; the plot only where matplotlib is installed."""
    text, data, plot = (run.folder / name for name in REPORT_FILES)
    text.write_text(report_text(run), encoding="utf-8")
    data.write_text(json.dumps(report_object(run), indent=1, ensure_ascii=False), encoding="utf-8")
    try:
        draw([run], plot)
    except ImportError:
        return [text, data]
    return [text, data, plot]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Scores of runs with two standard errors, and the paper's as lines."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.results))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(names) * len(runs)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(runs)
    for place, run in enumerate(runs):
        results = [run.results.get(name) for name in names]
        scores = [result.score if result else Score(math.nan, math.nan, 0) for result in results]
        heights = [row + (place - (len(runs) - 1) / 2) * height for row in range(len(names))]
        widths = [0.0 if math.isnan(score.percent) else score.percent for score in scores]
        errors = [0.0 if math.isnan(score.standard_error) else 2 * score.standard_error for score in scores]
        bars = axes.barh(heights, widths, height, xerr=errors, label=run.folder.name, capsize=2)
        axes.bar_label(bars, [number(score.percent) for score in scores], padding=3)
    known = {name: next(run.results[name] for run in runs if name in run.results).benchmark for name in names}
    label = "paper, 8B"
    for row, name in enumerate(names):
        paper = known[name].paper
        if paper is not None:
            axes.vlines(paper, row - 0.45, row + 0.45, colors="black", label=label)
            label = "_"
    axes.set_yticks(range(len(names)), [known[name].title for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("score, %; bars of two standard errors")
    axes.legend()
    figure.savefig(path)


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
        InputError: fewer than two runs, or nothing in common.
    """
    if len(runs) < 2:
        raise InputError("a comparison needs at least two runs")
    first, compared = runs[0], []
    for other in runs[1:]:
        for name in first.results:
            if name not in other.results:
                continue
            ours = {(s.task, s.doc_id): s for s in other.results[name].samples if s.points is not None}
            both = [(s, ours[s.task, s.doc_id]) for s in first.results[name].samples
                    if s.points is not None and (s.task, s.doc_id) in ours]  # fmt: skip
            if not both:
                continue
            gains = [(b.points or 0.0) - (a.points or 0.0) for a, b in both]
            difference = mean_score(gains, [a.cluster for a, _ in both])
            better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
            compared.append({
                "benchmark": name, "title": first.results[name].benchmark.title, "first": str(first.folder),
                "other": str(other.folder), "number": len(both),
                "first_percent": plain(score_of([a for a, _ in both]).percent),
                "other_percent": plain(score_of([b for _, b in both]).percent),
                "difference": plain(difference.percent), "standard_error": plain(difference.standard_error),
                "better": better, "worse": worse, "p": exact_mcnemar(better, worse),
            })  # fmt: skip
    if not compared:
        raise InputError("the runs have no samples in common")
    return {"compared": compared, "cost": {str(run.folder): cost(run) for run in runs}}


def compare_text(runs: Sequence[Run]) -> str:
    """A comparison in Markdown."""
    lines = ["| benchmark | samples | first | other | difference | standard error | better / worse | p | runs |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in compare(runs)["compared"]:
        lines.append(
            f"| {row['title']} | {row['number']} | {number(row['first_percent'])} | {number(row['other_percent'])} "
            f"| {signed(row['difference'])} | {number(row['standard_error'])} | {row['better']} / {row['worse']} "
            f"| {row['p']:.3g} | {Path(row['first']).name}, {Path(row['other']).name} |"
        )
    lines += ["", "Over the samples both runs have, every one counting alike. p: exact McNemar test, two-sided, which "
              "takes samples as independent; the standard error does not.", "", *cost_lines(runs)]  # fmt: skip
    return "\n".join(lines)
