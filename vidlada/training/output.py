"""The folder a run writes to: whether it may be used, and what is in it. torch is not needed to look."""

import shutil
from pathlib import Path

from vidlada.errors import InputError

STATE_FILE = "trainer_state.json"  # of a checkpoint; the last file that is written
WRITTEN_BY_A_RUN = ("checkpoint-*", "logs", "model", "model-published", "skipped*.jsonl", "not_finite_*.pt")


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
    """Make the output folder, or remove from it what an earlier run wrote, and nothing else."""
    output.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN_BY_A_RUN:
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in output.glob("checkpoint-*") if p.suffix != ".partial" and (p / STATE_FILE).is_file())


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint to resume from, if any."""
    found = checkpoints(output)
    return found[-1] if found else None
