"""Runs side by side: paired differences over the samples both have."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.evaluation.plots import write_plot
from vidlada.evaluation.report import cost, cost_lines, format_setting, format_signed, json_number, number
from vidlada.evaluation.results import Run, Sample, run_labels, score_of
from vidlada.files import write_json, write_text
from vidlada.markdown import table
from vidlada.scores import mean_score

COMPARISON_FILES = ("comparison.md", "comparison.json", "comparison.png")


def exact_mcnemar(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least so uneven among samples where two runs differ, if both were alike."""
    total, least = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, i) for i in range(least + 1)) / 2**total
    return min(1.0, 2 * tail)


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Every run against the first, over the samples both have.

    Raises:
        InputError: fewer than two runs, or one that has nothing in common with the first.
    """
    if len(runs) < 2:
        raise InputError("a comparison needs at least two runs")
    first, compared = runs[0], []
    for other in runs[1:]:
        pairs = {name: pair_samples(first, other, name) for name in first.results}
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
        "differing": differing_settings(runs),
        "cost": [cost(run) for run in runs],
    }


def pair_samples(first: Run, other: Run, name: str) -> list[tuple[Sample, Sample]]:
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
        "baseline_percent": json_number(score_of([a for a, _ in pairs]).percent),
        "percent": json_number(score_of([b for _, b in pairs]).percent),
        "difference": json_number(gain.percent), "standard_error": json_number(gain.standard_error),
        "better": better, "worse": worse, "p": exact_mcnemar(better, worse),
    }  # fmt: skip


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings and versions that are not the same in all runs, with the value in each."""
    values = [
        {**run.about["settings"], **run.about["settings"]["model_arguments"],
         **run.about["settings"]["generation_arguments"], **run.about["versions"]} for run in runs
    ]  # fmt: skip
    names = [
        name for name in dict.fromkeys(name for each in values for name in each) if not name.endswith("_arguments")
    ]
    found = {name: [format_setting(each.get(name)) or "–" for each in values] for name in names}
    return {name: each for name, each in found.items() if len(set(each)) > 1}


def compare_text(compared: dict[str, Any]) -> str:
    """A comparison in Markdown."""
    names = run_labels(compared["runs"])
    name_of = dict(zip(compared["runs"], names, strict=True))
    rows = [
        (row["title"], row["number"], number(row["baseline_percent"]), name_of[row["run"]], number(row["percent"]),
         format_signed(row["difference"]), number(row["standard_error"]), f"{row['better']} / {row['worse']}",
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
    """Write a comparison into a folder; the plot only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data, plot = (folder / name for name in COMPARISON_FILES)
    write_text(text, compare_text(compared))
    write_json(data, compared)
    return [text, data, *write_plot(runs, plot)]
