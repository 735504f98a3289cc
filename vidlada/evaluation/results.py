"""Judged samples of a run, and what they amount to: scores in percent with standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import BENCHMARKS, UNSENT, Benchmark
from vidlada.evaluation.folder import read_record, read_run_file, results_files, samples_file
from vidlada.evaluation.submission import verdict_of
from vidlada.files import read_json, read_json_lines
from vidlada.letters import read_letter
from vidlada.scores import Score, mean_of_scores, mean_score


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
        skipped: it is left out, as the run was asked to, because its video is missing.
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
    skipped: bool = False

    @property
    def key(self) -> tuple[str, int, str | None]:
        """What is the same for one question in any run."""
        return self.task, self.doc_id, self.question

    @property
    def cluster(self) -> str:
        """What samples of the same video share."""
        return self.video or f"{self.task} {self.doc_id}"


def score_of(samples: Sequence[Sample]) -> Score:
    """Of judged samples."""
    judged = [sample for sample in samples if sample.points is not None]
    return mean_score([s.points or 0.0 for s in judged], [s.cluster for s in judged])


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
        choices = [sample for sample in self.samples if sample.chooses and not sample.skipped]
        return sum(sample.letter is None and sample.error is None for sample in choices) if choices else None

    @property
    def failed(self) -> list[Sample]:
        """Samples that could not be asked and count as wrong."""
        return [sample for sample in self.samples if sample.error is not None and not sample.skipped]

    @property
    def skipped(self) -> list[Sample]:
        """Samples that are left out."""
        return [sample for sample in self.samples if sample.skipped]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where.
        about: settings, arguments, versions and what was skipped, from its run file.
        results: by benchmark.
    """

    folder: Path
    about: dict[str, Any]
    results: dict[str, BenchmarkResult]

    @property
    def samples(self) -> dict[tuple[str, int], Sample]:
        """All samples by task and number."""
        return {(s.task, s.doc_id): s for result in self.results.values() for s in result.samples}

    def is_partial(self, result: BenchmarkResult) -> bool:
        """Whether a score leaves something of its benchmark out."""
        few = any(
            task.expected and sum(sample.task == task.name for sample in result.samples) < task.expected
            for task in result.benchmark.tasks
        )
        left_out = few or result.absent or result.skipped
        return bool(left_out) or self.about["settings"]["limit"] is not None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: it is not one, or it holds no results.
    """
    about = read_run_file(folder)
    record = read_record(folder)
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(results_files(folder), key=lambda path: path.stat().st_mtime):
        found = read_json(file)["results"]
        newest |= {task: (file, numbers) for task, numbers in found.items() if samples_file(file, task).exists()}
    results = {}
    for name in about["tasks"]:
        benchmark = BENCHMARKS[name]
        tasks = {task.name: newest[task.name] for task in benchmark.tasks if task.name in newest}
        if tasks:
            samples = read_samples(
                benchmark, {task: file for task, (file, _) in tasks.items()}, record, about["skipped"]
            )
            own = {task: numbers.get(f"{benchmark.metric},none") for task, (_, numbers) in tasks.items()}
            verdict = score_of_verdict(folder) if name == UNSENT else None
            results[name] = benchmark_result(benchmark, samples, own, verdict)
    if not results:
        raise InputError(f"{folder} holds no results yet; run the same command again to continue")
    return Run(folder, about, results)


def run_labels(folders: Sequence[str]) -> list[str]:
    """Of run folders: their names, or their whole paths where names are shared."""
    names = {folder: Path(folder).absolute().name for folder in folders}
    unique = len(set(names.values())) == len(names)
    return [names[folder] if unique else folder for folder in folders]


def score_of_verdict(folder: Path) -> Score | None:
    """The server's accuracy as a score; every question has a video of its own."""
    verdict = verdict_of(folder)
    if verdict is None:
        return None
    right = round(verdict["accuracy"] * verdict["number"])
    values = [1.0] * right + [0.0] * (verdict["number"] - right)
    exact = mean_score(values, [str(number) for number in range(len(values))])
    return replace(exact, percent=100 * verdict["accuracy"])


def read_samples(
    benchmark: Benchmark,
    files: Mapping[str, Path],
    record: dict[tuple[str, int], dict[str, Any]],
    skipped: Mapping[str, Any],
) -> list[Sample]:
    """Samples of a benchmark, in order.

    Args:
        benchmark: which.
        files: results that lmms-eval wrote, by task.
        record: our own, by task and sample.
        skipped: of the run file, by task.
    """
    samples = []
    for task, file in files.items():
        missing = skipped.get(task, {}).get("videos", ())
        for logged in read_json_lines(samples_file(file, task)):
            sample = sample_of(benchmark, task, logged, record)
            if sample.error is not None and sample.video in missing:
                sample = replace(sample, points=None, skipped=True)
            samples.append(sample)
    return sorted(samples, key=lambda sample: (sample.task, sample.doc_id))


def benchmark_result(
    benchmark: Benchmark, samples: Sequence[Sample], own: Mapping[str, Any], verdict: Score | None
) -> BenchmarkResult:
    """Scores of a benchmark's samples; `own` is what lmms-eval computed for each task."""
    found = {sample.kind for sample in samples} - {None}
    kinds = [kind for kind in benchmark.kinds if kind in found] + sorted(found - set(benchmark.kinds), key=str)
    absent = [task.name for task in benchmark.tasks if task.name not in own]
    absent += [kind for kind in benchmark.kinds if kind not in found]
    return BenchmarkResult(
        benchmark=benchmark,
        samples=tuple(samples),
        tasks={task: score_of([s for s in samples if s.task == task]) for task in own},
        kinds={str(kind): score_of([s for s in samples if s.kind == kind]) for kind in kinds},
        absent=tuple(absent),
        lmms_eval={k: benchmark.scale * v for k, v in own.items() if isinstance(v, int | float)},
        verdict=verdict,
    )


def sample_of(
    benchmark: Benchmark, task: str, logged: dict[str, Any], record: dict[tuple[str, int], dict[str, Any]]
) -> Sample:
    """A logged sample, judged, with what our own record knows of it."""
    noted: dict[str, Any] = record.get((task, logged["doc_id"]), {})
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
        video=noted.get("video"),
        error=noted.get("error"),
        seconds=noted.get("seconds"),
        tokens=noted.get("tokens"),
        forward_passes=noted.get("forward_passes"),
    )
