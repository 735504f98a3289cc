"""How well a model answers the questions of a shapes dataset."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.files import read_json
from vidlada.markdown import table
from vidlada.scores import mean_score
from vidlada.shapes.captions import events_recovered
from vidlada.shapes.dataset import question_of
from vidlada.shapes.questions import BENCHMARK_FAMILIES, CHOICES_MARK, FAMILIES, LETTERS, LONG_FAMILIES
from vidlada.shapes.world import HELD_OUT, Clip

# A question and the answers to choose from, None where it is open
Asked = tuple[str, Sequence[str] | None]
# Answers to questions about one video; the path is None when the model must do without.
Answerer = Callable[[Path | None, Sequence[Asked]], list[str]]


ALL, LETTER = "all questions", "the same choices, by letter"
SEEN, UNSEEN = "short, of pairs seen in training", "short, of clips with an unseen pair"


@dataclass
class Score:
    """Answers of one family.

    Attributes:
        points: of each answer, 0 to 1: right or wrong, or the F1 of a long answer's clauses.
        chance: of each question: one over the number of choices, or the share of the family's commonest answer.
        videos: of each question, where known; questions about one video are not independent.
    """

    points: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)

    def add(self, points: float, chance: float, video: str) -> None:
        """Count an answer."""
        self.points.append(points)
        self.chance.append(chance)
        self.videos.append(video)

    @property
    def mean(self) -> float:
        """Percent."""
        return 100 * sum(self.points) / max(1, len(self.points))

    @property
    def standard_error(self) -> float:
        """Percent."""
        return mean_score(
            self.points, self.videos or [str(number) for number in range(len(self.points))]
        ).standard_error

    @property
    def mean_chance(self) -> float:
        """Percent."""
        return 100 * sum(self.chance) / max(1, len(self.chance))


@dataclass
class Report:
    """Scores by family, of clips with and without pairs unseen in training, of questions with choices when asked for a
    letter, and every answer."""

    families: dict[str, Score]
    unseen: dict[str, Score]
    letters: Score
    answers: list[dict[str, Any]]

    @property
    def short(self) -> Score:
        """All short-answer questions together."""
        return self._together(BENCHMARK_FAMILIES)

    @property
    def all(self) -> Score:
        """All questions together: the score of lmms-eval's task `shapes`."""
        return self._together(self.families)

    def _together(self, families: Iterable[str]) -> Score:
        scores = [self.families[family] for family in families if family in self.families]
        return Score(*([value for score in scores for value in getattr(score, name)]
                       for name in ("points", "chance", "videos")))  # fmt: skip

    def rows(self) -> dict[str, Score]:
        """Scores in the order they are shown."""
        together = {"all short answers": self.short, ALL: self.all}
        rows = {**self.families, **together, **self.unseen, LETTER: self.letters}
        return {name: score for name, score in rows.items() if score.points}

    def to_markdown(self) -> str:
        """Markdown."""
        rows = [
            (name, len(score.points), f"{score.mean:.1f}",
             "–" if math.isnan(score.standard_error) else f"{score.standard_error:.1f}",
             "–" if name in (*LONG_FAMILIES, ALL) else f"{score.mean_chance:.1f}")
            for name, score in self.rows().items()
        ]  # fmt: skip
        return "\n".join(table(("questions", "number", "right, %", "standard error", "chance, %"), rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "scores": {
                name: {
                    "number": len(score.points),
                    "percent": score.mean,
                    "standard_error": score.standard_error,
                    "chance": score.mean_chance,
                }
                for name, score in self.rows().items()
            },
            "answers": self.answers,
        }


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Entries of a shapes dataset's json; `InputError` names the file and what is wrong with it."""
    entries = read_json(path, "valid json")
    needed = {"id", "video", "conversations", "family", "choices", "clip"}
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of questions")
    for number, entry in enumerate(entries):
        lacking = sorted(needed - set(entry)) if isinstance(entry, dict) else sorted(needed)
        if lacking:
            raise InputError(f"{path}: entry {number} lacks {', '.join(lacking)}; write one with vidlada shapes write")
    return entries


def commonest_answers(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of the commonest open answer of each family."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if not entry["choices"]:
            counts[entry["family"]][entry["conversations"][1]["value"]] += 1
    return {family: max(counter.values()) / counter.total() for family, counter in counts.items()}


def shows_unseen(clip: Clip) -> bool:
    """Whether something in a clip has a colour and shape that training never shows together."""
    return any((thing.colour, thing.shape) in HELD_OUT for thing in clip.things)


def open_question(entry: dict[str, Any]) -> str:
    """The question of an entry without its choices."""
    return question_of(entry).partition(CHOICES_MARK)[0]


def right_choice(entry: dict[str, Any]) -> str:
    """The choice that an entry's letter stands for."""
    return str(entry["choices"][LETTERS.index(entry["conversations"][1]["value"])])


def points(entry: dict[str, Any], answer: str) -> float:
    """1 or 0 for a short answer; F1 of the clauses for a caption or timeline."""
    if entry["family"] in LONG_FAMILIES:
        return events_recovered(answer, Clip.from_dict(entry["clip"]))[2]
    return matches(answer, entry["conversations"][1]["value"])


def matches(answer: str, truth: str) -> float:
    """1 or 0, whatever the case and a full stop at the end."""
    return float(answer.strip().rstrip(".").strip().lower() == truth.lower())


def evaluate(
    entries: Sequence[dict[str, Any]],
    folder: Path,
    answerer: Answerer,
    blind: bool = False,
    letters: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Ask every question and score the answers.

    Where a question has choices, the answerer gets the question without them and the choices beside it.

    Args:
        entries: of a shapes dataset.
        folder: where the dataset lies.
        answerer: asks the model.
        blind: ask without the video: what the questions give away by themselves.
        letters: also ask questions with choices as they are written, for a letter.
        progress: called with the number of answered questions.
    """
    by_video: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_video[entry["video"]].append(entry)
    commonest = commonest_answers(entries)
    families = {family: Score() for family in FAMILIES}
    unseen, by_letter = {SEEN: Score(), UNSEEN: Score()}, Score()
    answers: list[dict[str, Any]] = []
    for video, of_video in by_video.items():
        path = None if blind else folder / video
        replies = answerer(path, [(open_question(entry), entry["choices"]) for entry in of_video])
        lettered = [entry for entry in of_video if letters and entry["choices"]]
        chosen = iter(answerer(path, [(question_of(entry), None) for entry in lettered]) if lettered else [])
        for entry, answer in zip(of_video, replies, strict=True):
            chance = 1 / len(entry["choices"]) if entry["choices"] else commonest[entry["family"]]
            point = matches(answer, right_choice(entry)) if entry["choices"] else points(entry, answer)
            scores = [families[entry["family"]]]
            if entry["family"] in BENCHMARK_FAMILIES:
                scores.append(unseen[UNSEEN if shows_unseen(Clip.from_dict(entry["clip"])) else SEEN])
            for score in scores:
                score.add(point, chance, video)
            truth = entry["conversations"][1]["value"]
            answers.append({"id": entry["id"], "family": entry["family"], "question": question_of(entry),
                            "truth": truth, "answer": answer, "points": point})  # fmt: skip
            if letters and entry["choices"]:
                answers[-1]["letter"] = next(chosen)
                by_letter.add(points(entry, answers[-1]["letter"]), chance, video)
        progress(len(answers))
    families, unseen = ({name: score for name, score in part.items() if score.points} for part in (families, unseen))
    return Report(families, unseen, by_letter, answers)
