"""A training run as YAML: validated dataclasses."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from vidlada.errors import InputError
from vidlada.training.data import CollateSettings

Built = TypeVar("Built")


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own data and learning rate.

    Args:
        name: shown in the log.
        steps: optimizer steps.
        learning_rate: at the stage's start (after warm-up).
        final_learning_rate: at its end; the same as `learning_rate` by default.
        schedule: how the rate goes from one to the other.
        data: arguments of the source; `kind` is `shapes` or `llava`.
        collate: see `CollateSettings`.
    """

    name: str
    steps: int
    learning_rate: float
    data: dict[str, Any]
    final_learning_rate: float | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    collate: CollateSettings = field(default_factory=CollateSettings)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"stage {self.name}: steps must be at least 1, not {self.steps}")
        if not self.learning_rate > 0:
            raise InputError(f"stage {self.name}: learning_rate must be above 0, not {self.learning_rate}")
        if self.schedule not in ("linear", "cosine"):
            raise InputError(f"stage {self.name}: schedule must be linear or cosine, not {self.schedule!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """One run.

    Args:
        output: folder of checkpoints, logs and the final model.
        stages: in order.
        model: arguments of `VidLaDAConfig`, for a model trained from nothing; or
        init_from: a model folder to start from.
        seed: of initial weights, data order and masking.
        precision: of the forward pass; weights and optimizer stay float32.
        weight_decay, beta1, beta2, gradient_clip: of AdamW.
        warmup_steps: linear warm-up from 0 at the run's start.
        checkpoint_every, keep_checkpoints: in steps; older ones are deleted.
        log_every: in steps.
        workers: processes that prepare batches.
        stratified: spread the masking times of a batch evenly.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
    """

    output: str
    stages: tuple[Stage, ...]
    model: dict[str, Any] | None = None
    init_from: str | None = None
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    gradient_clip: float = 1.0
    warmup_steps: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    workers: int = 1
    stratified: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_from is None):
            raise InputError("give either model (a new one) or init_from (a folder), and not both")
        if not self.stages:
            raise InputError("stages is empty; a run needs at least one")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step's number within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise InputError(f"step {step} is past the end of the run")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""

        stage, within = self.stage_at(step)
        last = stage.learning_rate if stage.final_learning_rate is None else stage.final_learning_rate
        progress = within / stage.steps
        if stage.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        rate = stage.learning_rate + (last - stage.learning_rate) * progress
        return rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


def build(kind: type[Built], values: Any, where: str) -> Built:
    """A dataclass from a mapping; `InputError` names an unknown or missing entry and where it stands."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping, got {values!r}")
    known = {entry.name for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, values)) - known)
    if unknown:
        raise InputError(f"{where}: unknown entry {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def load_config(path: Path, output: str | None = None) -> TrainingConfig:
    """Read a YAML run description.

    Args:
        path: the file.
        output: overrides the file's own `output`.

    Raises:
        InputError: the file is missing or malformed, or an entry is unknown or invalid.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    stages = []
    for number, entry in enumerate(values.get("stages") or []):
        where = f"{path}: stages[{number}]"
        if isinstance(entry, dict) and "collate" in entry:
            entry = {**entry, "collate": build(CollateSettings, entry["collate"], f"{where}.collate")}
        stages.append(build(Stage, entry, where))
    if output is not None:
        values["output"] = output
    return build(TrainingConfig, {**values, "stages": tuple(stages)}, str(path))
