"""What a cache costs in right answers, and what it saves in work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vidlada.api import EncodedVideo, VidLaDA
from vidlada.bench.decoding import BASELINE, CACHES
from vidlada.shapes.benchmark import Asked, Report, Score, evaluate
from vidlada.shapes.questions import LONG_FAMILIES


def quality_figures(
    vidlada: VidLaDA,
    entries: Sequence[dict[str, Any]],
    folder: Path,
    caches: Sequence[str] = CACHES,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> dict[str, Any]:
    """Ask every question with every cache.

    Args:
        vidlada: the model.
        entries, folder: of a shapes dataset.
        caches: policies as `GenerationSettings.cache` takes them; full recompute is always measured first.
        progress: called with what is measured next.
        options: as of `VidLaDA.ask`.

    Caches speed up decoding, so questions with choices are decoded too, without a look at the choices.

    Returns:
        For each cache the percentage of right short answers, the captions' score, each with its standard error, the
        percentage of answers that are full recompute's to the letter, and the work: positions computed in all layers,
        as a percentage of full recompute's.

    Raises:
        InputError: a video, an option or a policy cannot be used.
    """
    names = list(dict.fromkeys((BASELINE, *caches)))
    for name in names:
        vidlada.settings(cache=name)
    watched: dict[Path | None, EncodedVideo] = {}
    reports: dict[str, Report] = {}
    work: dict[str, int] = {}
    for name in names:
        progress(name)
        work[name] = 0

        def answers(video: Path | None, asked: Sequence[Asked], name: str = name) -> list[str]:
            if video not in watched:
                watched[video] = vidlada.encode_video(video)
            found = vidlada.ask_many(
                [(watched[video], question) for question, _ in asked], **{**options, "cache": name}
            )
            work[name] += sum(sum(answer.statistics.layer_tokens) for answer in found)
            return [answer.text for answer in found]

        reports[name] = evaluate(entries, folder, answers)
    reference = [answer["answer"] for answer in reports[BASELINE].answers]
    rows = []
    for name, report in reports.items():
        long = Score([p for f, score in report.families.items() if f in LONG_FAMILIES for p in score.points])
        same = sum(said["answer"] == expected for said, expected in zip(report.answers, reference, strict=True))
        rows.append(
            {
                "cache": name,
                "short_percent": report.short.mean,
                "short_standard_error": report.short.standard_error,
                "long_percent": long.mean,
                "long_standard_error": long.standard_error,
                "same_percent": 100 * same / len(reference),
                "work_percent": 100 * work[name] / work[BASELINE],
            }
        )
    short = reports[BASELINE].short
    return {
        "model": vidlada.name,
        "short_questions": len(short.points),
        "long_questions": len(entries) - len(short.points),
        "rows": rows,
    }


def quality_table(figures: dict[str, Any]) -> str:
    """Markdown of `quality_figures`."""
    lines = [
        f"{figures['model']}, {figures['short_questions']} short and {figures['long_questions']} long questions; work "
        f"is positions computed in all layers",
        "",
        "| cache | right short answers, % | captions, % | same answers as none, % | work, % of none |",
        "|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['cache']} | {row['short_percent']:.1f} ± {row['short_standard_error']:.1f} "
            f"| {row['long_percent']:.1f} ± {row['long_standard_error']:.1f} | {row['same_percent']:.1f} "
            f"| {row['work_percent']:.1f} |"
        )
    return "\n".join(lines)
