"""The folder of a run: who may write there, and what is complete in it. Looked at before torch is imported."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vidlada.errors import InputError
from vidlada.files import PARTIAL, lock, partial_of

STATE_FILE = "trainer_state.json"
LOCK_FILE = ".lock"
MODELS = ("model", "model-best", "model-published")
WRITTEN_BY_A_RUN = ("checkpoint-*", "logs", *MODELS, "skipped*.jsonl", "not_finite_*.pt")


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used; nothing is changed.

    Raises:
        InputError: it is in use and neither `resume` nor `overwrite` is given, or there is nothing to resume.
    """
    if resume:
        if newest_checkpoint(output) is None:
            raise InputError(f"{output} holds no checkpoint to resume from; start again without --resume")
        return
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; choose another output")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise InputError(
            f"{output} is not empty; continue that run with --resume, replace it with --overwrite, or choose another"
        )


def clear_output(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    remove_partial(output)
    for pattern in WRITTEN_BY_A_RUN:
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in output.glob("checkpoint-*") if p.suffix != PARTIAL and (p / STATE_FILE).is_file())


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint to resume from, if any."""
    found = checkpoints(output)
    return found[-1] if found else None


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """An output folder for one run at a time: what torchrun started goes on writing when torchrun itself is killed.

    The lock is of this process alone; unlike flock's it is not kept by a loader's processes, which outlive it a little.

    Raises:
        InputError: another run is at work in it.
    """
    output.mkdir(parents=True, exist_ok=True)
    busy = f"{output}: another run is at work in it; end that, or choose another output"
    with (output / LOCK_FILE).open("w") as file:
        with suppress(OSError):  # a file system without locks
            lock(file, busy, inherited=False)
        try:
            yield
        finally:
            (output / LOCK_FILE).unlink(missing_ok=True)


def remove_partial(output: Path) -> None:
    """Remove what runs that were killed left half written, or half deleted."""
    for name in ("checkpoint-*", "model*"):
        for path in output.glob(name + PARTIAL):
            shutil.rmtree(path)


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a folder that is complete now its name; an older one of the same run goes."""
    old = partial_of(folder.with_name(f"{folder.name}-old"))
    if folder.exists():
        folder.rename(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
