"""What a run folder holds: settings, lmms-eval's results and samples, and our own record of every sample."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vidlada.errors import InputError

RUN_FILE, LOG_FILE = "run.json", "lmms-eval.log"
SUBMISSION_FILE, VERDICT_FILE = "egoschema_submission.json", "egoschema_verdict.json"
# In the environment rather than among the model arguments, which lmms-eval's response cache takes for the model's name.
RECORD_FOLDER = "VIDLADA_EVAL_RECORD"


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """A run folder for one command at a time: the lock's file descriptor; processes that inherit it hold it too.

    Raises:
        InputError: another command is at work in it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.glob("record-*.jsonl"):
                with path.open() as record:
                    fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another run is going on in it") from error
        yield lock
    finally:
        os.close(lock)


def open_record(folder: Path, rank: int) -> TextIO:
    """A process's file, to be added to. While it is open the folder is in use: what torchrun started goes on without
    its command, and without the lock, when that is killed."""
    record = (folder / f"record-{rank}.jsonl").open("a", encoding="utf-8")
    fcntl.flock(record, fcntl.LOCK_SH)
    return record


def read_record(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The latest entry of every task and sample; a line cut short by an interruption is left out."""
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("record-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
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
        found: dict[str, Any] = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
        found["settings"], found["tasks"], found["arguments"]  # noqa: B018 - has to be there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output}: not the folder of a run (no readable {RUN_FILE})") from error
    return found


def results_files(output: Path) -> set[Path]:
    """Aggregated results that lmms-eval has written."""
    return set((output / "lmms-eval").rglob("*_results.json"))


def samples_file(results: Path, task: str) -> Path:
    """Logged samples of a task beside the results of the same run."""
    return results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
