"""Stages of a run: their data, their steps, and which process works on which part of a step."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vidlada.errors import InputError
from vidlada.training.collate import Part
from vidlada.training.config import TrainingConfig, build
from vidlada.training.llava import LlavaSource
from vidlada.training.models import starting_config
from vidlada.training.samples import Source
from vidlada.training.shapes_source import ShapesSource

SEEDS_PER_RUN = 1000  # stages of runs with different seeds never share one
EVALUATION = SEEDS_PER_RUN - 1  # in place of a stage's number, which none reaches


def make_source(values: dict[str, Any], image_size: int, seed: int, where: str) -> Source:
    """The source that a stage's or evaluation's `data` describes.

    Args:
        values: its arguments, and `kind`.
        image_size: pixels along a side of a frame.
        seed: unless the arguments bring one.
        where: what errors call it.
    """
    kind = values.get("kind")
    arguments = {"seed": seed, **{name: value for name, value in values.items() if name != "kind"}}
    if kind == "shapes":
        return build(ShapesSource, {"image_size": image_size, **arguments}, where)
    if kind == "llava":
        return build(LlavaSource, {"size": image_size, **arguments}, where)
    raise InputError(f"{where}: data.kind must be shapes or llava, not {kind!r}")


def stage_seed(config: TrainingConfig, number: int) -> int:
    """Seed of a stage's data, or of the evaluation's."""
    return config.seed * SEEDS_PER_RUN + number


def stage_sources(config: TrainingConfig, image_size: int) -> list[Source]:
    """The sources of all stages; a missing or malformed data file is refused here, before anything is spent."""
    return [
        make_source(stage.data, image_size, stage_seed(config, number), f"stage {stage.name}: data")
        for number, stage in enumerate(config.stages)
    ]


def evaluation_source(config: TrainingConfig, image_size: int) -> Source | None:
    """The source of held-out samples, if the run has any."""
    if config.evaluation is None:
        return None
    return make_source(config.evaluation.data, image_size, stage_seed(config, EVALUATION), "evaluation: data")


def image_size_of(config: TrainingConfig) -> int:
    """Pixels along a side of a frame, of the model a run starts from; its weights are not read."""
    return int(starting_config(config).vision_config.image_size)  # type: ignore[union-attr]


def resolved(config: TrainingConfig, sources: list[Source]) -> TrainingConfig:
    """The run with epochs as steps, and the warm-up in steps."""
    stages = tuple(
        stage if stage.epochs is None else replace(stage, steps=source.steps_of(stage.epochs), epochs=None)
        for stage, source in zip(config.stages, sources, strict=True)
    )
    config = replace(config, stages=stages)
    if config.warmup_share is None:
        return config
    return replace(config, warmup_steps=math.ceil(config.warmup_share * config.total_steps), warmup_share=None)


class PartSampler:
    """The parts of steps that one process works on, in order.

    Args:
        steps: numbers within the stage.
        source: tells how many items a step has.
        per_device_batch: most items of a part; None for one part a process.
        processes, process: how many there are, and which this is.
    """

    def __init__(self, steps: range, source: Source, per_device_batch: int | None, processes: int, process: int):
        self.all_steps, self.source, self.per_device_batch = steps, source, per_device_batch
        self.processes, self.process = processes, process

    def __iter__(self) -> Iterator[Part]:
        for step in self.all_steps:
            passes = 1
            if self.per_device_batch is not None:
                passes = math.ceil(len(self.source.plan(step)) / (self.per_device_batch * self.processes))
            for number in range(passes):
                yield Part(step, number * self.processes + self.process, passes * self.processes)


def schedule(config: TrainingConfig) -> str:
    """A run's stages as a table: what a dry run prints. Model weights are not loaded, data files are read.

    Raises:
        InputError: the model or the data cannot be used.
    """
    sources = stage_sources(config, image_size_of(config))
    config = resolved(config, sources)
    lines = [
        "| stage | steps | learning rate | at its end | tower | projector | frozen |",
        "|---|---|---|---|---|---|---|",
    ]
    start = 0
    for stage in config.stages:
        first, last = (config.learning_rate(step) for step in (start, start + stage.length - 1))
        rates = [f"{stage.learning_rate * stage.rate_ratio(part):.1e}" for part in ("tower", "projector")]
        lines.append(
            f"| {stage.name} | {stage.length} | {stage.learning_rate:.1e} from {first:.1e} | {last:.1e} | "
            f"{' | '.join(rates)} | {', '.join(stage.frozen) or 'nothing'} |"
        )
        start += stage.length
    lines.append(f"\n{config.total_steps} steps, the first {config.warmup_steps} of them warm-up")
    return "\n".join(lines)
