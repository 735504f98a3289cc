"""Scores of runs as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidlada.evaluation.results import Run, run_labels
from vidlada.files import atomic_path
from vidlada.scores import NONE


def draw(runs: Sequence[Run]) -> Any:
    """Scores of runs with 95 % intervals, and the paper's as lines: a Figure."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.results))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(names) * len(runs)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(runs)
    for place, (run, label) in enumerate(zip(runs, run_labels([str(run.folder) for run in runs]), strict=True)):
        results = [run.results.get(name) for name in names]
        scores = [result.score if result else NONE for result in results]
        heights = [row + (place - (len(runs) - 1) / 2) * height for row in range(len(names))]
        errors = [[score.percent - score.low for score in scores], [score.high - score.percent for score in scores]]
        axes.barh(heights, [score.percent for score in scores], height, xerr=errors, label=label, capsize=2)
        for middle, score in zip(heights, scores, strict=True):
            axes.text(1.01, middle, str(score), transform=axes.get_yaxis_transform(), va="center")
    known = {name: next(run.results[name] for run in runs if name in run.results).benchmark for name in names}
    label = "paper, 8B"
    for row, name in enumerate(names):
        paper = known[name].paper
        if paper is not None:
            axes.vlines(paper, row - 0.45, row + 0.45, colors="black", label=label)
            label = "_"
    partial = {name for run in runs for name, result in run.results.items() if run.is_partial(result)}
    axes.set_yticks(range(len(names)), [known[name].title + " *" * (name in partial) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    note = "\n* not the whole benchmark, not comparable with the paper" if partial else ""
    axes.set_xlabel(f"score, % with 95 % intervals{note}")
    figure.legend(loc="outside upper center", ncols=len(runs) + 1)
    return figure


def write_plot(runs: Sequence[Run], path: Path) -> list[Path]:
    """Write the picture, unless matplotlib is missing; the paths of what was written."""
    try:
        figure = draw(runs)
    except ImportError:
        return []
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    return [path]
