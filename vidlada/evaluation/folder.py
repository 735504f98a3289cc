"""What a run folder holds: the settings, the report, lmms-eval's results and samples with our own record of every
sample; and in one sub-folder, which may be deleted, caches."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vidlada.errors import InputError
from vidlada.files import lock, open_folder, read_json

RUN_FILE, LOG_FILE = "run.json", "lmms-eval.log"
ORIGINAL_FOLDER, CACHE_FOLDER = "lmms-eval", "cache"
SUBMISSION_FILE, VERDICT_FILE = "egoschema_submission.json", "egoschema_verdict.json"
# In the environment rather than among the model arguments, which lmms-eval's response cache takes for the model's name.
RECORD_FOLDER = "VIDLADA_EVAL_RECORD"


@contextmanager
def lock_run(folder: Path) -> Iterator[int]:
    """Lock a run folder: yields the lock's file descriptor; processes that inherit it share the lock.

    Raises:
        InputError: another command is at work in it.
    """
    busy = f"{folder}: another run is going on in it"
    with open_folder(folder) as descriptor:
        lock(descriptor, busy)
        for path in record_files(folder):
            with path.open() as record:
                lock(record, busy)
        yield descriptor


def open_record(folder: Path, rank: int) -> TextIO:
    """A process's file, to be added to. While it is open the folder is in use: what torchrun started goes on without
    its command, and without the lock, when that is killed."""
    (folder / ORIGINAL_FOLDER).mkdir(parents=True, exist_ok=True)
    record = (folder / ORIGINAL_FOLDER / f"record-{rank}.jsonl").open("a", encoding="utf-8")
    lock(record, f"{folder}: another run is going on in it", shared=True)
    return record


def record_files(folder: Path) -> list[Path]:
    """Records of every process."""
    return sorted((folder / ORIGINAL_FOLDER).glob("record-*.jsonl"))


def read_record(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The latest entry of every task and sample; a line cut short by an interruption is left out."""
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for path in record_files(folder):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            key = entry["task"], entry["doc_id"]
            if key not in entries or entries[key]["time"] <= entry["time"]:
                entries[key] = entry
    return entries


def read_run_file(output: Path) -> dict[str, Any]:
    """What a run folder says about itself; `InputError` if it is none."""
    try:
        found: dict[str, Any] = read_json(output / RUN_FILE)
        found["settings"], found["tasks"], found["arguments"], found["skipped"]  # noqa: B018 - has to be there
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{output}: not the folder of a run (no readable {RUN_FILE})") from error
    return found


def results_files(output: Path) -> set[Path]:
    """Aggregated results that lmms-eval has written."""
    return set((output / ORIGINAL_FOLDER).rglob("*_results.json"))


def samples_file(results: Path, task: str) -> Path:
    """Logged samples of a task beside the results of the same run."""
    return results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
