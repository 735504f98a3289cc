"""Checkpoints of a run: complete or not there at all, however many processes write them."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from vidlada.checkpoint.load import save_model
from vidlada.errors import VidLaDAError
from vidlada.processor import VidLaDAProcessor
from vidlada.training.config import TrainingConfig
from vidlada.training.output import PARTIAL, STATE_FILE, checkpoints, put_in_place, remove_partial
from vidlada.training.parallel import any_process, on_main

# What a full disk shows up as: Python's own error, safetensors', torch.save's, and the sharded writer's.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, CheckpointException)

# Damaged files and weights of another shape: Python's own, torch.load's, safetensors', and the sharded reader's.
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, EOFError, UnpicklingError)


class NotSaved(VidLaDAError):  # noqa: N818 - what happened, and the run may go on
    """A checkpoint could not be written; those before it are whole."""


def save_checkpoint(
    accelerator: Accelerator, model: Any, processor: VidLaDAProcessor, config: TrainingConfig, state: dict[str, Any]
) -> None:
    """Write everything needed to continue, under a temporary name first; then delete the oldest checkpoints.

    Args:
        accelerator: of all processes; each calls this.
        model: wrapped.
        processor, config: of the run.
        state: plain values to keep; `step` names the checkpoint.

    Raises:
        NotSaved: the disk is full or cannot be written, in any process; nothing is left of the attempt.
    """
    folder = Path(config.output) / f"checkpoint-{state['step']:07d}"
    partial = folder.with_name(folder.name + PARTIAL)
    on_main(accelerator, lambda: remove_partial(folder.parent))

    def write() -> None:
        accelerator.save_state(str(partial))

    def write_model() -> None:
        if accelerator.is_main_process:
            save_model(accelerator.unwrap_model(model), processor, partial / "model", weights)
            (partial / STATE_FILE).write_text(json.dumps({**state, "config": asdict(config)}, indent=1, default=str))
            put_in_place(partial, folder)
            for old in checkpoints(folder.parent)[: -config.keep_checkpoints]:
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))  # if killed here, the rest has that name

    together(accelerator, write, folder, partial)
    weights = accelerator.get_state_dict(model)
    together(accelerator, write_model, folder, partial)


def together(accelerator: Accelerator, write: Any, folder: Path, partial: Path) -> None:
    """Write in every process; if that fails in one, clean up and raise in all."""
    problem: BaseException | None = None
    try:
        write()
    except WRITE_ERRORS as error:
        problem = error
    if any_process(accelerator, problem is not None):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        reason = "another process could not write" if problem is None else str(problem).splitlines()[0]
        raise NotSaved(f"{folder.name} was not written: {reason}; the checkpoints before it are kept") from problem
