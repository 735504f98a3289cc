"""One report of a run: Markdown, JSON, a plot, and every answer."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vidlada.evaluation.benchmarks import BENCHMARKS
from vidlada.evaluation.plots import write_plot
from vidlada.evaluation.results import BenchmarkResult, Run, run_labels
from vidlada.files import write_json, write_text
from vidlada.markdown import table
from vidlada.scores import Score

FAILURES_SHOWN = 20
REPORT_FILES = ("report.md", "report.json", "answers.jsonl", "report.png")
ANSWER_FIELDS = ("task", "doc_id", "video", "kind", "answer", "letter", "points", "error", "skipped", "seconds",
                 "tokens", "forward_passes")  # fmt: skip


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_signed(value: float | None) -> str:
    """A difference, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:+.1f}"


def json_number(value: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return None if value is None or math.isnan(value) else round(value, 4)


def score_dict(score: Score) -> dict[str, Any]:
    """A score for JSON."""
    return {
        "percent": json_number(score.percent),
        "standard_error": json_number(score.standard_error),
        "interval": [json_number(score.low), json_number(score.high)],
        "number": score.number,
    }


def difference(run: Run, result: BenchmarkResult) -> float | None:
    """Of our score and the paper's, where both are of the whole benchmark."""
    paper = result.benchmark.paper
    return None if paper is None or run.is_partial(result) else result.score.percent - paper


def report_dict(run: Run) -> dict[str, Any]:
    """The whole report as plain values."""
    return {
        "run": run.about,
        "benchmarks": {name: benchmark_dict(run, result) for name, result in run.results.items()},
        "cost": cost(run),
    }


def benchmark_dict(run: Run, result: BenchmarkResult) -> dict[str, Any]:
    """One benchmark as plain values."""
    benchmark, score = result.benchmark, result.score
    return {
        "title": benchmark.title,
        **score_dict(score),
        "mean_over": benchmark.mean,
        "paper": benchmark.paper,
        "difference": json_number(difference(run, result)),
        "partial": run.is_partial(result),
        "failed": [
            {"task": s.task, "doc_id": s.doc_id, "video": s.video, "error": s.error} for s in result.failed
        ],
        "skipped": len(result.skipped),
        "without_letter": result.without_letter,
        "absent": list(result.absent),
        "lmms_eval": result.lmms_eval,
        "tasks": {task: score_dict(each) for task, each in result.tasks.items()},
        "kinds": {kind: score_dict(each) for kind, each in result.kinds.items()},
    }  # fmt: skip


def cost(run: Run) -> dict[str, Any]:
    """What the answers took, over samples with a record."""
    noted = [s for s in run.samples.values() if s.seconds is not None and s.error is None]
    seconds, tokens = sum(s.seconds or 0 for s in noted), sum(s.tokens or 0 for s in noted)
    return {
        "samples": len(noted),
        "seconds": round(seconds, 2),
        "seconds_per_sample": json_number(seconds / len(noted)) if noted else None,
        "tokens": tokens,
        "tokens_per_second": json_number(tokens / seconds) if seconds else None,
        "forward_passes": sum(s.forward_passes or 0 for s in noted),
    }


def report_text(run: Run) -> str:
    """The report in Markdown."""
    settings = run.about["settings"]
    lines = [f"# {settings['model']}", ""]
    rows, notes = [], []
    for result in run.results.values():
        score, paper = result.score, result.benchmark.paper
        mark, gain = " *" if run.is_partial(result) else "", format_signed(difference(run, result))
        rows.append(
            (result.benchmark.title + mark, len(result.samples) - len(result.skipped), score,
             number(score.standard_error), number(paper), gain, len(result.failed), number(result.without_letter, 0))
        )  # fmt: skip
        if result.absent:
            notes.append(f"{result.benchmark.title} lacks {', '.join(result.absent)}: the mean is over the others.")
    rows += [(BENCHMARKS[name].title, "skipped", *6 * "–") for name in run.about["tasks"] if name not in run.results]
    if any(run.is_partial(result) for result in run.results.values()):
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
    lines += ["", *skipped_lines(run), *failure_lines(run)]
    lines += ["## Cost", "", *cost_lines(run_labels([str(run.folder)]), [cost(run)])]
    lines += ["", "## Settings", "", *settings_lines(run)]
    return "\n".join(lines) + "\n"


def detail_lines(result: BenchmarkResult) -> list[str]:
    """Scores of tasks and question types, absent ones named, beside what lmms-eval printed."""
    rows: list[tuple[object, ...]] = [
        (name, score.number, score, number(score.standard_error), printed)
        for parts, printed_of in ((result.tasks, result.lmms_eval), (result.kinds, None))
        for name, score in parts.items()
        for printed in ["" if printed_of is None else number(printed_of.get(name))]
    ]
    rows += [(name, "absent", "–", "–", "") for name in result.absent]
    head = ("part", "samples", "score", "standard error", "lmms-eval")
    return [f"## {result.benchmark.title}", "", *table(head, rows)]


def skipped_lines(run: Run) -> list[str]:
    """Tasks and questions that the run was asked to leave out, and why."""
    lines = []
    for task, gap in run.about["skipped"].items():
        questions = sum(sample.task == task for result in run.results.values() for sample in result.skipped)
        if gap["problem"] is not None:
            lines.append(f"- {task}: {gap['problem']}")
        elif questions:
            lines.append(f"- {task}: {questions} questions about {', '.join(gap['videos'][:FAILURES_SHOWN])}, missing")
    return ["## Skipped", "", "What is missing was to be left out; it counts neither as right nor as wrong.", "",
            *lines, ""] if lines else []  # fmt: skip


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
    settings = {name: format_setting(value) for name, value in about["settings"].items()}
    lines = [f"- {name}: {value}" for name, value in settings.items() if value]
    for kind in ("model", "generation"):
        shared: dict[str, list[str]] = {}
        for name, arguments in about["arguments"].items():
            shared.setdefault(format_setting(arguments[kind]) or "the task’s own", []).append(name)
        lines += [f"- {kind} of {', '.join(names)}: {values}" for values, names in shared.items()]
    return [*lines, f"- versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"]


def format_setting(value: Any) -> str:
    """A setting, or a group of them; nothing where none was given."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return "" if value is None else str(value)


def answer_lines(run: Run) -> Iterator[str]:
    """Every answer with its points, a JSON object a line."""
    for sample in run.samples.values():
        yield json.dumps({name: getattr(sample, name) for name in ANSWER_FIELDS}) + "\n"


def write_report(run: Run) -> list[Path]:
    """Write the report into the run folder; the plot only where matplotlib is installed."""
    text, data, answers, plot = (run.folder / name for name in REPORT_FILES)
    write_text(text, report_text(run))
    write_json(data, report_dict(run))
    write_text(answers, "".join(answer_lines(run)))
    return [text, data, answers, *write_plot([run], plot)]
