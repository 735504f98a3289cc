"""Checkpoints of a run: complete or not there at all, however many processes write them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from vidlada.checkpoint.load import save_model
from vidlada.errors import InputError, VidLaDAError
from vidlada.files import partial_of, write_text
from vidlada.processor import VidLaDAProcessor
from vidlada.training.config import TrainingConfig
from vidlada.training.figures import Progress
from vidlada.training.output import STATE_FILE, checkpoints, put_in_place, remove_partial
from vidlada.training.parallel import any_process, is_deepspeed, on_main

# What a full disk shows up as: Python's own error, safetensors', torch.save's, and the sharded writer's.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, CheckpointException)

# Damaged files and weights of another shape: Python's own, torch.load's, safetensors', and the sharded reader's.
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, EOFError, UnpicklingError)


# Settings that do not change what is learned
BESIDE_THE_CURVE = (
    "output", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "tracker", "layouts", "save_dtype",
    "name",
)  # fmt: skip


class NotSaved(VidLaDAError):  # noqa: N818 - what happened, and the run may go on
    """A checkpoint could not be written; those before it are whole."""


def save_checkpoint(
    accelerator: Accelerator,
    model: Any,
    processor: VidLaDAProcessor,
    config: TrainingConfig,
    state: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write everything needed to continue, under a temporary name first; then delete the oldest checkpoints.

    Args:
        accelerator: of all processes; each calls this.
        model: wrapped.
        processor, config: of the run.
        state: plain values to keep; `step` names the checkpoint.
        dtype: of the weights in its model folder; those to continue from stay as they are.

    Raises:
        NotSaved: the disk is full or cannot be written, in any process; nothing is left of the attempt.
    """
    folder = Path(config.output) / f"checkpoint-{state['step']:07d}"
    partial = partial_of(folder)
    on_main(accelerator, lambda: remove_partial(folder.parent))
    write_everywhere(accelerator, lambda: accelerator.save_state(str(partial)), folder)
    weights = accelerator.get_state_dict(model)

    def write() -> None:
        if accelerator.is_main_process:
            save_model(accelerator.unwrap_model(model), processor, partial / "model", weights, dtype)
            values = {**state, "processes": accelerator.num_processes, "config": asdict(config)}
            write_text(partial / STATE_FILE, json.dumps(values, indent=1, default=str))
            put_in_place(partial, folder)
            for old in checkpoints(folder.parent)[: -config.keep_checkpoints]:
                shutil.rmtree(old.rename(partial_of(old)))  # if killed here, the rest has that name

    write_everywhere(accelerator, write, folder)


def load_checkpoint(
    accelerator: Accelerator, config: TrainingConfig, checkpoint: Path, say: Callable[[str], Any]
) -> Progress:
    """Continue from a checkpoint, and say which settings changed since.

    Args:
        accelerator: whose model and optimizers are prepared.
        config: of the run as it is now.
        checkpoint: folder.
        say: takes lines for the user.

    Raises:
        InputError: it is damaged, or of a run whose weights or optimizer have another form.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        check_processes(accelerator, checkpoint, state)
        accelerator.load_state(str(checkpoint))
    except READ_ERRORS as error:
        raise InputError(
            f"{checkpoint} is damaged, or not of this run, whose model, optimizer and learning rates of parts must "
            f"be as they were: {str(error).splitlines()[0]}"
        ) from error
    now = json.loads(json.dumps(asdict(config), default=str))
    before = state.get("config", now)
    changed = [name for name in now if name not in BESIDE_THE_CURVE and now[name] != before.get(name, now[name])]
    say(f"resumed from {checkpoint.name}{'; changed since: ' * bool(changed)}{', '.join(changed)}")
    return Progress(**{name: state[name] for name in ("step", "seen", "skipped") if name in state})


def check_processes(accelerator: Accelerator, checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse to continue with DeepSpeed in another number of processes: each reads the state of its own optimizer."""
    before = state.get("processes", accelerator.num_processes)
    if is_deepspeed(accelerator) and before != accelerator.num_processes:
        raise InputError(
            f"{checkpoint} was written by {before} processes of DeepSpeed, which cannot be continued by "
            f"{accelerator.num_processes}; use as many, or start a new run with init_from: {checkpoint / 'model'}"
        )


def write_folder(
    accelerator: Accelerator,
    model: Any,
    processor: VidLaDAProcessor,
    folder: Path,
    dtype: torch.dtype | None,
    then: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model folder, complete or not at all.

    Args:
        accelerator: of all processes; each calls this.
        model: wrapped.
        processor: of it.
        folder: to write; what is there is replaced.
        dtype: of the weights; as they are by default.
        then: adds files to it before it gets its name.

    Raises:
        NotSaved: the disk is full or cannot be written; nothing is left of the attempt.
    """
    weights = accelerator.get_state_dict(model)
    partial = partial_of(folder)

    def write() -> None:
        if accelerator.is_main_process:
            remove_partial(folder.parent)
            save_model(accelerator.unwrap_model(model), processor, partial, weights, dtype)
            then(partial)
            put_in_place(partial, folder)

    write_everywhere(accelerator, write, folder)


def save_final(
    accelerator: Accelerator,
    model: Any,
    processor: VidLaDAProcessor,
    config: TrainingConfig,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Write the final model, in every layout asked for: each is complete, or not there.

    Args:
        accelerator, model, processor, folder, dtype: as for `write_folder`.
        config: of the run.

    Raises:
        VidLaDAError: the disk is full or cannot be written.
    """

    def write_published() -> None:
        if accelerator.is_main_process and "published" in config.layouts:
            from vidlada.checkpoint.convert import convert

            published = folder.with_name("model-published")
            shutil.rmtree(published, ignore_errors=True)  # of the same run, which was continued after its end
            convert(folder, published, "published")

    try:
        write_folder(accelerator, model, processor, folder, dtype)
        write_everywhere(accelerator, write_published, folder.with_name("model-published"))
    except NotSaved as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise VidLaDAError(
            f"the model was not written: {reason}; all is in the last checkpoint: make room, and continue with --resume"
        ) from error


def write_everywhere(accelerator: Accelerator, write: Callable[[], None], folder: Path) -> None:
    """Write in every process; if that fails in one, clean up and raise in all."""
    problem: BaseException | None = None
    try:
        write()
    except WRITE_ERRORS as error:
        problem = error
    if any_process(accelerator, problem is not None):
        if accelerator.is_main_process:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
        accelerator.wait_for_everyone()
        reason = "another process could not write" if problem is None else str(problem).splitlines()[0]
        raise NotSaved(f"{folder.name} was not written: {reason}; what was written before is kept") from problem
