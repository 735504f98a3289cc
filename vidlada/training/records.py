"""What processes write into a run's folder beside checkpoints: broken samples, and a batch without a finite loss."""

import json
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from vidlada.training.checkpoints import WRITE_ERRORS


class Records:
    """The files of one process.

    Args:
        output: folder of the run.
        process: number of the process, which keeps its files apart; those of the main one have no number.
    """

    def __init__(self, output: Path, process: int):
        self.output, self.suffix = output, f"-{process}" if process else ""

    def note_skipped(self, step: int, problems: list[str]) -> None:
        """Add broken samples to the run's list."""
        if problems:
            with suppress(OSError), (self.output / f"skipped{self.suffix}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "problem": problem}) + "\n" for problem in problems)

    def save_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Save the batch whose loss is not finite; a full disk does not hide that it is not."""
        path = self.output / f"not_finite_{step}{self.suffix}.pt"
        try:
            # plain values only, which torch.load reads without executing anything
            torch.save({name: asdict(value) if is_dataclass(value) else value for name, value in batch.items()}, path)  # type: ignore[arg-type]
        except WRITE_ERRORS:
            path.unlink(missing_ok=True)

    def saved_batches(self, step: int) -> str:
        """Where the batches of a step are, of all processes."""
        found = sorted(path.name for path in self.output.glob(f"not_finite_{step}[.-]*"))
        return f"saved as {', '.join(found)} in {self.output}" if found else "could not be saved"
