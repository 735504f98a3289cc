"""A training run as YAML: validated dataclasses."""

import difflib
import math
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.training.data import STRICT, CollateSettings

Built = TypeVar("Built")


@dataclass(frozen=True, config=STRICT)
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
    steps: PositiveInt
    learning_rate: PositiveFloat
    data: dict[str, Any]
    final_learning_rate: NonNegativeFloat | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    collate: CollateSettings = field(default_factory=CollateSettings)


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """One run.

    Args:
        output: folder of checkpoints, logs and the final model.
        stages: in order.
        model: arguments of `VidLaDAConfig`, for a model trained from nothing; or
        init_from: a model folder to start from.
        seed: of initial weights, data order and masking.
        precision: of the forward pass; weights and optimizer stay float32.
        optimizer: `adamw`, or `muon`: the layers' matrices by Muon, everything else by AdamW, at one learning rate
            (its updates are scaled to AdamW's size). Muon needs whole matrices: one process or DDP, not sharded.
        weight_decay, beta1, beta2, gradient_clip: of the optimizer; the betas are AdamW's.
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    gradient_clip: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 100
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 20
    workers: NonNegativeInt = 1
    stratified: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_from is None):
            raise InputError("give either model (a new one) or init_from (a folder), and not both")
        if not self.stages:
            raise InputError("stages is empty; a run needs at least one")

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
    """A validated dataclass from a mapping.

    Args:
        kind: the dataclass; its fields may be dataclasses too.
        values: its entries.
        where: what the error calls the mapping.

    Raises:
        InputError: an entry is unknown, missing or invalid; it names each with its place.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{where}: {'; '.join(problems(error, kind))}") from error


def problems(error: ValidationError, kind: type) -> list[str]:
    """A line for each invalid entry."""
    lines = []
    for problem in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        if problem["type"] == "unexpected_keyword_argument":
            known = [entry.name for entry in fields(_kind_at(kind, problem["loc"][:-1]))]
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            lines.append(f"{place}: unknown entry; {hint}")
        elif problem["type"] == "missing_argument":
            lines.append(f"{place}: missing")
        else:
            lines.append(f"{place}: {problem['msg']}, got {problem['input']!r}" if place else problem["msg"])
    return lines


def _kind_at(kind: Any, place: tuple[int | str, ...]) -> Any:
    """The dataclass that stands at a place in another."""
    for part in place:
        if isinstance(part, str):
            kind = next(entry.type for entry in fields(kind) if entry.name == part)
        elif get_args(kind):
            kind = get_args(kind)[0]
    return kind


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    if output is not None:
        values["output"] = output
    return build(TrainingConfig, values, str(path))
