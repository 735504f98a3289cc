"""What a cache and a commit rule cost in right answers, and what they save in passes and work: the frontier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidlada.api import VidLaDA
from vidlada.bench.decoding import BASELINE, CACHES
from vidlada.conversation import EncodedVideo
from vidlada.decoding.commit import TopK
from vidlada.markdown import table
from vidlada.shapes.benchmark import Asked, Report, Score, evaluate
from vidlada.shapes.questions import LONG_FAMILIES

REFERENCE = (BASELINE, TopK.name)


@dataclass
class Outcome:
    """All answers of one way to decode.

    Attributes:
        report: scores.
        passes: through the model, over all answers.
        work: positions computed in all layers.
    """

    report: Report
    passes: int
    work: int

    @property
    def long(self) -> Score:
        """Captions and timelines together."""
        return Score([p for f, score in self.report.families.items() if f in LONG_FAMILIES for p in score.points])

    @property
    def points(self) -> float:
        """Mean over all questions, in percent."""
        return Score([answer["points"] for answer in self.report.answers]).mean


def quality_figures(
    vidlada: VidLaDA,
    entries: Sequence[dict[str, Any]],
    folder: Path,
    caches: Sequence[str] = CACHES,
    commits: Sequence[str] = (TopK.name,),
    variations: Sequence[dict[str, Any]] = (),
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> dict[str, Any]:
    """Ask every question with every cache, every commit rule and every variation of the other settings.

    Args:
        vidlada: the model.
        entries, folder: of a shapes dataset.
        caches: policies as `GenerationSettings.cache` takes them.
        commits: rules as `GenerationSettings.commit` takes them. Full recompute at one token a step is measured first.
        variations: settings that differ; each is measured beside the settings as they are. With `reuse`, the questions
            about a video are asked one after another.
        progress: called with what is measured next.
        options: as of `VidLaDA.ask`.

    Caches speed up decoding, so questions with choices are decoded too, without a look at the choices.

    Returns:
        For each pair the percentage of right short answers, the captions' score, each with its standard error, the
        percentage of answers that are the reference's to the letter, the passes an answer took, the work (positions
        computed in all layers, as a percentage of the reference's), and whether it is on the frontier: no other is at
        least as good in points, passes and work and better in one.

    Raises:
        InputError: a video, an option, a rule or a policy cannot be used.
    """
    for name in ("threshold", "factor"):  # short for rules
        if name in options:
            key = "confidence" if name == "threshold" else name
            commits = (f"{name}:{key}={options.pop(name)}",)
    pairs = [(cache, commit) for commit in commits for cache in caches]
    plain = list(dict.fromkeys((REFERENCE, *pairs)))
    ways = [{"cache": cache, "commit": commit} for cache, commit in plain]
    ways += [{"cache": cache, "commit": commit, **changes} for changes in variations for cache, commit in pairs]
    for way in ways:
        vidlada.settings(**way)
    watched: dict[Path | None, EncodedVideo] = {}
    outcomes = list[Outcome]()
    for way in ways:
        progress(", ".join(f"{name} {value}" for name, value in way.items()))
        outcomes.append(ask_all(vidlada, entries, folder, watched, **{**options, **way}))
    reference = outcomes[0]
    rows = []
    for way, found in zip(ways, outcomes, strict=True):
        frontier = not any(dominates(other, found) for other in outcomes)
        changes = {name: value for name, value in way.items() if name not in ("cache", "commit")}
        pair = {"cache": way["cache"], "commit": way["commit"], "changes": changes}
        rows.append({**pair, **row_of(found, reference), "frontier": frontier})
    short = len(reference.report.short.points)
    return {
        "model": vidlada.name, "clips": len({entry["video"] for entry in entries}), "short_questions": short,
        "long_questions": len(entries) - short, "options": options, "rows": rows,
    }  # fmt: skip


def ask_all(
    vidlada: VidLaDA,
    entries: Sequence[dict[str, Any]],
    folder: Path,
    watched: dict[Path | None, EncodedVideo],
    **options: Any,
) -> Outcome:
    """Ask every question in one way; videos that were not encoded before join `watched`."""
    passes = work = 0

    def answers(video: Path | None, questions: Sequence[Asked]) -> list[str]:
        nonlocal passes, work
        if video not in watched:
            watched[video] = vidlada.encode_video(video)
        if options.get("reuse"):
            chat = vidlada.chat(watched[video], **options)
            found = [chat.ask(question) for question, _ in questions]
        else:
            found = vidlada.ask_many([(watched[video], question) for question, _ in questions], **options)
        passes += sum(answer.statistics.forward_passes for answer in found)
        work += sum(sum(answer.statistics.layer_tokens) for answer in found)
        return [answer.text for answer in found]

    report = evaluate(entries, folder, answers)
    return Outcome(report, passes, work)


def row_of(found: Outcome, reference: Outcome) -> dict[str, float]:
    """The figures of one way beside those of the reference."""
    pairs = list(zip(found.report.answers, reference.report.answers, strict=True))
    return {
        "short_percent": found.report.short.mean,
        "short_standard_error": found.report.short.standard_error,
        "long_percent": found.long.mean,
        "long_standard_error": found.long.standard_error,
        "same_percent": 100 * sum(one["answer"] == other["answer"] for one, other in pairs) / len(pairs),
        "passes": found.passes / len(pairs),
        "work_percent": 100 * found.work / reference.work,
    }


def dominates(one: Outcome, other: Outcome) -> bool:
    """At least as good in points, passes and work, and better in one of them."""
    pairs = ((one.points, other.points), (-one.passes, -other.passes), (-one.work, -other.work))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def quality_table(figures: dict[str, Any]) -> str:
    """Markdown of `quality_figures`."""
    given = "".join(f", {name}={value}" for name, value in figures["options"].items())
    title = (
        f"{figures['model']}, {figures['clips']} clips, {figures['short_questions']} short and "
        f"{figures['long_questions']} long questions{given}; work is positions computed in all layers; a star is on "
        f"the frontier of points, passes and work"
    )
    head = ["cache", "commit rule", "setting", "right short answers, %", "captions, %", "same answers as none, %",
            "passes", "work, % of none", ""]  # fmt: skip
    rows = [
        [row["cache"], row["commit"], setting_text(row["changes"]),
         f"{row['short_percent']:.1f} ± {row['short_standard_error']:.1f}",
         f"{row['long_percent']:.1f} ± {row['long_standard_error']:.1f}", f"{row['same_percent']:.1f}",
         f"{row['passes']:.1f}", f"{row['work_percent']:.1f}", "*" if row["frontier"] else ""]
        for row in figures["rows"]
    ]  # fmt: skip
    if not any(row["changes"] for row in figures["rows"]):
        head, *rows = [[*row[:2], *row[3:]] for row in (head, *rows)]
    return "\n".join([title, "", *table(head, rows)])


def setting_text(changes: dict[str, Any]) -> str:
    """A variation in a table."""
    return ", ".join(f"{name}={value}" for name, value in changes.items())
