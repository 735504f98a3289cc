"""Where the data of benchmarks lies on this machine, and whether all of it is there. Nothing is downloaded here."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import Benchmark, Document, Task
from vidlada.files import read_json, read_json_lines
from vidlada.markdown import table
from vidlada.settings import format_value, half_character, texts_of

SHOWN_MISSING = 3  # videos named in a check
SUBTITLES = "subtitle_path"  # field of a question
CLOCK = re.compile(r"\d+:\d+:\d+(\.\d*)?$")
SPOKEN_TIMES = re.compile(r"\s*\d+:\d+:\d+,\d+\s* --> \s*\d+:\d+:\d+,\d+\s*$")
QUESTION_KINDS = ("parquet", "jsonl", "json")


def data_root(given: Path | None) -> Path:
    """The folder asked for, or HF_HOME, or the place it stands for by default."""
    root = given or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return root.expanduser().absolute()


def repository_folder(root: Path, repository: str) -> Path | None:
    """Local copy of a dataset: below the root under its own name, or the newest snapshot in the hub's cache."""
    if (root / repository).is_dir():
        return root / repository
    snapshots = root / "hub" / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else None


def documents(folder: Path, config: str | None, split: str) -> list[Document]:
    """Rows of a dataset's split.

    Args:
        folder: a copy of its repository.
        config: name of its configuration; None for the default one.
        split: train, validation or test.

    Raises:
        InputError: the questions are not there, or cannot be read.
    """
    return [row for file in question_files(folder, config, split) for row in _rows(file)]


def question_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """Where the rows of a split lie, in order; arguments and errors as for `documents`."""
    for patterns in _patterns(folder, config, split):
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        if files:
            return files
    raise InputError(f"{folder}: no files of the {split} split{f' of {config}' if config else ''}")


def _patterns(folder: Path, config: str | None, split: str) -> list[list[str]]:
    """Where a split may lie, best first: as the README's `configs` say, else by name; many copies lack the README."""
    found = []
    configs = _configs(folder / "README.md")
    for entry in configs:
        default = entry.get("default") or entry.get("config_name") == "default" or len(configs) == 1
        if entry.get("config_name") == config or (config is None and default):
            listed = entry.get("data_files", [])
            parts = [listed] if isinstance(listed, str | dict) else listed
            paths = [part if isinstance(part, str) else part["path"] for part in parts
                     if isinstance(part, str) or part.get("split", "train") == split]  # fmt: skip
            found.append([path for part in paths for path in ([part] if isinstance(part, str) else part)])
    for kind in QUESTION_KINDS:
        if config is None:
            found.append([f"**/{split}*.{kind}"])
        else:
            found.append([f"**/{config}/{split}*.{kind}", f"**/{config}.{kind}"])
    return found


def _configs(readme: Path) -> list[dict[str, Any]]:
    """The `configs` in the YAML head of a dataset card."""
    if not readme.is_file():
        return []
    head = readme.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        parsed = yaml.safe_load(head[1]) if len(head) > 2 else {}
    except yaml.YAMLError as error:
        raise InputError(f"{readme}: its YAML head is damaged: {str(error).splitlines()[0]}") from error
    return parsed.get("configs", []) if isinstance(parsed, dict) else []


def _rows(file: Path) -> list[Document]:
    try:
        if file.suffix == ".parquet":
            try:
                from pyarrow.parquet import read_table
            except ImportError as error:
                raise InputError(f"{file}: reading it needs pyarrow; install vidlada[eval]") from error
            rows: list[Document] = read_table(file).to_pylist()
            return rows
        if file.suffix == ".jsonl":
            return _check_rows(file, read_json_lines(file))
        rows = read_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: cannot be read: it holds no list of questions")
    return _check_rows(file, rows)


def _check_rows(file: Path, rows: list[Any]) -> list[Document]:
    """Rows as lmms-eval can load them."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{file}: entry {number} is no question: {format_value(row)}")
        for name, text in texts_of(row, ""):
            if problem := half_character(text):
                raise InputError(f"{file}: entry {number}: {name} has {problem}")
    return rows


@dataclass(frozen=True)
class TaskData:
    """What of a task's data is there.

    Attributes:
        task: which.
        problem: why its questions cannot be read; None if they can.
        questions: how many.
        videos: how many different ones they are about.
        missing: those that are not there, as paths below the root.
    """

    task: Task
    problem: str | None = None
    questions: int = 0
    videos: int = 0
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every question can be asked."""
        return self.problem is None and not self.missing


def check_task(root: Path, benchmark: Benchmark, task: Task) -> TaskData:
    """Read a task's questions and look for every video."""
    folder = repository_folder(root, benchmark.repository)
    if folder is None:
        return TaskData(task, f"{benchmark.repository} is not below {root}")
    if benchmark.beside and not (root / benchmark.folder / benchmark.beside).is_dir():
        return TaskData(task, f"{root / benchmark.folder / benchmark.beside} is not there")
    try:
        rows = documents(folder, task.config, benchmark.split)
        if benchmark.beside:  # lmms-eval ends where one is missing
            named = {row[SUBTITLES] for row in rows if row.get(SUBTITLES)}
            lacking = [
                name for name in sorted(named) if not (root / benchmark.folder / benchmark.beside / name).exists()
            ]
            if lacking:
                return TaskData(task, f"{len(lacking)} of {len(named)} subtitle files are missing (e.g. {lacking[0]})")
            spoken = named or {f"{row['videoID']}.srt" for row in rows}
            check_subtitles(root / benchmark.folder / benchmark.beside / name for name in sorted(spoken))
        needed: dict[str, bool] = {}
        for row in rows:
            paths = [f"{benchmark.folder}/{path}" for path in benchmark.videos(row, task.name)]
            if paths[0] not in needed:
                needed[paths[0]] = any((root / path).exists() for path in paths)
    except InputError as error:
        return TaskData(task, str(error))
    except KeyError as error:
        return TaskData(task, f"{folder}: its questions have no field {error}; another version of the dataset?")
    except TypeError as error:
        return TaskData(task, f"{folder}: a field of its questions has another type ({error}); another version?")
    missing = tuple(path for path, there in needed.items() if not there)
    return TaskData(task, None, len(rows), len(needed), missing)


def check_subtitles(paths: Iterable[Path]) -> None:
    """Refuse subtitles that lmms-eval would end at; those that are missing are left out there.

    Raises:
        InputError: one is not in UTF-8, or not the list or the sections it should be.
    """
    for path in filter(Path.is_file, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not in UTF-8; convert it, as by iconv -f latin1 -t utf-8") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if path.suffix == ".json":
            try:
                spoken = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: not valid JSON: {error}") from error
            if not isinstance(spoken, list) or not all(isinstance(line, dict) for line in spoken):
                raise InputError(f"{path}: not a list of subtitles")
            for number, line in enumerate(spoken):
                if not is_spoken(line):
                    raise InputError(f"{path}: entry {number} is no subtitle: {format_value(line)}")
            if any(half_character(text) for line in spoken for _, text in texts_of(line, "")):
                raise InputError(f"{path}: it holds half a character; remove it")
            continue
        for section in text.split("\n\n"):
            lines = section.split("\n")
            if section.strip() and len(lines) >= 3 and not SPOKEN_TIMES.match(lines[1]):
                raise InputError(f"{path}: not SubRip: {format_value(lines[1])} where times should be")


def is_spoken(line: Mapping[str, Any]) -> bool:
    """Whether an entry of LongVideoBench's subtitles has the times and the text that lmms-eval reads."""
    if "timestamp" in line:  # its end may be null
        times = line["timestamp"]
        timed = isinstance(times, list) and len(times) == 2 and type(times[0]) in (int, float)
        return timed and isinstance(line.get("text"), str)
    return isinstance(line.get("line"), str) and all(CLOCK.match(str(line.get(name))) for name in ("start", "end"))


def check(root: Path, benchmarks: Sequence[Benchmark]) -> dict[str, list[TaskData]]:
    """What is there of every benchmark, by name."""
    return {each.name: [check_task(root, each, task) for task in each.tasks] for each in benchmarks}


@dataclass(frozen=True)
class Gap:
    """What a task lacks.

    Attributes:
        problem: why none of its questions can be asked; None if some can.
        videos: that are missing, as paths below the root.
    """

    problem: str | None
    videos: tuple[str, ...] = ()


def find_gaps(root: Path, benchmarks: Sequence[Benchmark]) -> dict[str, Gap]:
    """Tasks of benchmarks that cannot be asked as a whole, by name."""
    gaps = {}
    for benchmark in benchmarks:
        for found in (check_task(root, benchmark, task) for task in benchmark.tasks):
            problem = found.problem
            if problem is None and found.videos and len(found.missing) == found.videos:
                problem = f"none of its {found.videos} videos is below {root / benchmark.folder}"
            if problem is not None or found.missing:
                gaps[found.task.name] = Gap(problem, found.missing)
    return gaps


def how_to_get(root: Path, benchmark: Benchmark) -> str:
    """What to do about a benchmark whose data is not complete."""
    if benchmark.name == "shapes":
        return f"vidlada eval run --tasks shapes writes its clips to {root / benchmark.folder}"
    by_hand = f"hf download {benchmark.repository} --repo-type dataset --local-dir {root / benchmark.repository}"
    if benchmark.unpacked:
        videos = f"the same with --revision {benchmark.unpacked} --local-dir {root / benchmark.folder}"
    else:
        videos = f"unpack its archives into {root / benchmark.folder}"
    return f"vidlada eval download --tasks {benchmark.name} gets it; by hand: {by_hand}, then {videos}"


def check_dict(root: Path, found: dict[str, list[TaskData]]) -> dict[str, Any]:
    """A check as plain values."""
    tasks = {
        data.task.name: {
            "problem": data.problem, "questions": data.questions, "published": data.task.expected,
            "videos": data.videos, "missing": list(data.missing), "complete": data.complete,
        }
        for each in found.values() for data in each
    }  # fmt: skip
    return {"data_root": str(root), "tasks": tasks}


def check_table(root: Path, benchmarks: Sequence[Benchmark], found: dict[str, list[TaskData]]) -> str:
    """Markdown: what is there, what is missing, and how to get it."""
    rows: list[tuple[object, ...]] = []
    todo: list[str] = []
    for benchmark in benchmarks:
        for data in found[benchmark.name]:
            expected = data.task.expected or "–"
            counts = (data.questions, expected, data.videos, len(data.missing))
            rows.append((data.task.name, *(counts if data.problem is None else ("–", expected, "–", "–"))))
            if data.problem:
                todo.append(f"{data.task.name}: {data.problem}")
            elif data.missing:
                named = ", ".join(data.missing[:SHOWN_MISSING])
                more = len(data.missing) - SHOWN_MISSING
                todo.append(f"{data.task.name}: missing {named}{f' and {more} more' if more > 0 else ''}")
        if not all(data.complete for data in found[benchmark.name]):
            todo.append(f"  {how_to_get(root, benchmark)}")
    lines = table(("task", "questions", "published", "videos", "missing"), rows)
    return "\n".join([f"Data below {root}:", "", *lines, "", *(todo or ["Everything is there."])])
