"""Judged samples of a run, and what they amount to: scores in percent with standard errors."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import BENCHMARKS, UNSENT, Benchmark
from vidlada.evaluation.folder import read_record, read_run_file, results_files, samples_file
from vidlada.evaluation.letters import read_letter
from vidlada.evaluation.submission import verdict_of


@dataclass(frozen=True)
class Sample:
    """One answered question.

    Attributes:
        task, doc_id: which.
        question: hash of the row of the benchmark: copies of one may number their rows otherwise.
        answer: as lmms-eval judged it.
        points: 0 to 1; 0 for a question that failed, even where a task would draw an answer at random. None where the
            truth is not public.
        kind: question type.
        video: path; questions about one video are not independent.
        error: why it failed.
        seconds, tokens, forward_passes: what the answer cost; None if it came from the response cache of lmms-eval
            without a record.
        letter: that the answer chooses; None where it holds none.
        chooses: whether it should.
    """

    task: str
    doc_id: int
    answer: str
    points: float | None
    kind: str | None = None
    video: str | None = None
    error: str | None = None
    seconds: float | None = None
    tokens: int | None = None
    forward_passes: int | None = None
    question: str | None = None
    letter: str | None = None
    chooses: bool = False

    @property
    def key(self) -> tuple[str, int, str | None]:
        """What is the same for one question in any run."""
        return self.task, self.doc_id, self.question

    @property
    def cluster(self) -> str:
        """What samples of the same video share."""
        return self.video or f"{self.task} {self.doc_id}"


@dataclass(frozen=True)
class Score:
    """A mean in percent.

    Attributes:
        percent: NaN without samples.
        standard_error: percent; NaN with fewer than two videos.
        number: of samples.
    """

    percent: float
    standard_error: float
    number: int


def mean_score(values: Sequence[float], clusters: Sequence[str]) -> Score:
    """Mean with the standard error of means over clusters (each sample its own cluster gives the usual one).

    Args:
        values: 0 to 1.
        clusters: of each; the values of one may depend on each other.
    """
    number = len(values)
    if not number:
        return Score(math.nan, math.nan, 0)
    mean = sum(values) / number
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return Score(100 * mean, math.nan, number)
    variance = sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1) / number**2
    return Score(100 * mean, 100 * math.sqrt(variance), number)


def score_of(samples: Sequence[Sample]) -> Score:
    """Of judged samples."""
    judged = [sample for sample in samples if sample.points is not None]
    return mean_score([s.points or 0.0 for s in judged], [s.cluster for s in judged])


def mean_of_scores(scores: Sequence[Score]) -> Score:
    """Every part counts alike; parts are taken as independent."""
    parts = [score for score in scores if score.number]
    if not parts:
        return Score(math.nan, math.nan, 0)
    error = math.sqrt(sum(part.standard_error**2 for part in parts)) / len(parts)
    return Score(sum(part.percent for part in parts) / len(parts), error, sum(part.number for part in parts))


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark of a run.

    Attributes:
        benchmark: which.
        samples: all that were answered.
        tasks, kinds: scores of its tasks and question types that are there.
        absent: tasks or question types without a sample.
        lmms_eval: what lmms-eval itself printed for each task, in percent; a task it could not score is left out.
        verdict: score of samples whose truths are not public, where their server was asked.
    """

    benchmark: Benchmark
    samples: tuple[Sample, ...]
    tasks: dict[str, Score]
    kinds: dict[str, Score]
    absent: tuple[str, ...]
    lmms_eval: dict[str, float]
    verdict: Score | None = None

    @property
    def score(self) -> Score:
        """What the benchmark's paper reports, over what is there."""
        if self.verdict is not None:
            return self.verdict
        if self.benchmark.mean == "tasks":
            return mean_of_scores(list(self.tasks.values()))
        if self.benchmark.mean == "kinds":
            return mean_of_scores(list(self.kinds.values()))
        return score_of(self.samples)

    @property
    def without_letter(self) -> int | None:
        """Answers that should have chosen a letter and hold none; None where nothing is chosen."""
        choices = [sample for sample in self.samples if sample.chooses]
        return sum(sample.letter is None and sample.error is None for sample in choices) if choices else None

    @property
    def failed(self) -> list[Sample]:
        """Samples that could not be asked."""
        return [sample for sample in self.samples if sample.error is not None]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where.
        about: settings, arguments and versions, from its run file.
        results: by benchmark.
    """

    folder: Path
    about: dict[str, Any]
    results: dict[str, BenchmarkResult]

    @property
    def samples(self) -> dict[tuple[str, int], Sample]:
        """All samples by task and number."""
        return {(s.task, s.doc_id): s for result in self.results.values() for s in result.samples}


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: it is not one, or it holds no results.
    """
    about = read_run_file(folder)
    record = read_record(folder)
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(results_files(folder), key=lambda path: path.stat().st_mtime):
        found = json.loads(file.read_text(encoding="utf-8"))["results"]
        newest |= {task: (file, numbers) for task, numbers in found.items() if samples_file(file, task).exists()}
    results = {}
    for name in about["tasks"]:
        benchmark = BENCHMARKS[name]
        tasks = {task.name: newest[task.name] for task in benchmark.tasks if task.name in newest}
        if tasks:
            results[name] = replace(
                _benchmark_result(benchmark, tasks, record), verdict=_verdict(folder) if name == UNSENT else None
            )
    if not results:
        raise InputError(f"{folder} holds no results yet; run the same command again to continue")
    return Run(folder, about, results)


def _verdict(folder: Path) -> Score | None:
    """The server's accuracy as a score; every question has a video of its own."""
    verdict = verdict_of(folder)
    if verdict is None:
        return None
    accuracy, number = verdict["accuracy"], verdict["number"]
    error = math.sqrt(accuracy * (1 - accuracy) / (number - 1)) if number > 1 else math.nan
    return Score(100 * accuracy, 100 * error, number)


def _benchmark_result(
    benchmark: Benchmark, tasks: dict[str, tuple[Path, dict[str, Any]]], record: dict[tuple[str, int], dict[str, Any]]
) -> BenchmarkResult:
    samples = [
        sample_of(benchmark, task, json.loads(line), record)
        for task, (file, _) in tasks.items()
        for line in samples_file(file, task).read_text(encoding="utf-8").splitlines()
    ]
    samples.sort(key=lambda sample: (sample.task, sample.doc_id))
    found = {sample.kind for sample in samples} - {None}
    kinds = [kind for kind in benchmark.kinds if kind in found] + sorted(found - set(benchmark.kinds), key=str)
    lacking = [task.name for task in benchmark.tasks if task.name not in tasks]
    lacking += [kind for kind in benchmark.kinds if kind not in found]
    own = {task: numbers.get(f"{benchmark.metric},none") for task, (_, numbers) in tasks.items()}
    return BenchmarkResult(
        benchmark=benchmark,
        samples=tuple(samples),
        tasks={task: score_of([s for s in samples if s.task == task]) for task in tasks},
        kinds={str(kind): score_of([s for s in samples if s.kind == kind]) for kind in kinds},
        absent=tuple(lacking),
        lmms_eval={k: benchmark.scale * v for k, v in own.items() if isinstance(v, int | float)},
    )


def sample_of(
    benchmark: Benchmark, task: str, logged: dict[str, Any], record: dict[tuple[str, int], dict[str, Any]]
) -> Sample:
    """A logged sample, judged, with what our own record knows of it."""
    noted = record.get((task, logged["doc_id"]), {})
    judged = logged.get(benchmark.metric)
    points = None if judged is None or benchmark.name == UNSENT else benchmark.right(judged)
    if noted.get("error") is not None and points is not None:
        points = 0.0
    answers = logged["filtered_resps"]
    answer = str(answers[0] if isinstance(answers, list) and len(answers) == 1 else answers)
    is_open = isinstance(judged, dict) and judged.get("question_type") == "open"
    chooses = bool(benchmark.letters) and not is_open
    return Sample(
        task=task,
        doc_id=logged["doc_id"],
        answer=answer,
        letter=read_letter(answer, benchmark.letters) if chooses else None,
        chooses=chooses,
        points=points,
        kind=None if judged is None else benchmark.kind(judged),
        question=logged.get("doc_hash"),
        **{name: noted.get(name) for name in ("video", "error", "seconds", "tokens", "forward_passes")},
    )
