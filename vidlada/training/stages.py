"""What a run needs, read and checked before torch is imported: a mistake ends a run at once."""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.markdown import table
from vidlada.training.config import CollateSettings, TrainingConfig
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.samples import Source
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.origin import is_llama, origin
from vidlada.training.settings import build

SEEDS_PER_RUN = 1000  # stages of runs with different seeds never share one
EVALUATION = SEEDS_PER_RUN - 1  # in place of a stage's number, which none reaches
KINDS: dict[str, type[Source]] = {"shapes": ShapesSource, "llava": LlavaSource}


@dataclass(frozen=True)
class PreparedRun:
    """A run whose settings fit together and whose data files are read.

    Attributes:
        config: with epochs as steps, and the warm-up in steps.
        sources: of its stages.
        held_out: of its evaluation.
    """

    config: TrainingConfig
    sources: list[Source]
    held_out: Source | None


def prepare_run(config: TrainingConfig) -> PreparedRun:
    """Check what a run needs and read its data files.

    Raises:
        InputError: a folder or package is missing, or the data cannot be used.
    """
    check_needs(config)
    sources = stage_sources(config)
    held_out = evaluation_source(config)
    describes = config.init_from is None or is_llama(origin(config.init_from))  # else the checkpoint says it all
    text_only = describes and config.new_model.get("text_only", False)
    for stage, source in zip(config.stages, sources, strict=True):
        check_fit(f"stage {stage.name}", stage.collate, source, text_only)
    if config.evaluation is not None and held_out is not None:
        check_fit("evaluation", config.evaluation.collate, held_out, text_only)
    return PreparedRun(resolve_epochs(config, sources), sources, held_out)


def check_needs(config: TrainingConfig) -> None:
    """Refuse a run whose starting folder or packages are not there."""
    if config.init_from is not None:
        folder = origin(config.init_from)
        if config.model is not None and not is_llama(folder):
            raise InputError(
                f"init_from: {folder} is a whole model already; model goes with a Llama-family language model, or alone"
            )
        if folder.resolve().is_relative_to(Path(config.output).resolve()):
            raise InputError(
                f"init_from: {folder} lies in the run's own output, {config.output}; choose another output"
            )
        if "text_config" in (config.model or {}):
            raise InputError(f"model: text_config: the language model is that of init_from, {folder}; leave it out")
    needs = {
        f"tracker: {config.tracker}": None if config.tracker == "none" else config.tracker,
        f"parallel: {config.parallel}": "deepspeed" if config.parallel in ("zero2", "zero3") else None,
        "lora": None if config.lora is None else "peft",
    }
    for setting, package in needs.items():
        if package is not None and find_spec(package) is None:  # accelerate would only warn of a tracker
            raise InputError(f"{setting} needs {package}, which is not installed: pip install {package}")


def check_fit(where: str, collate: CollateSettings, source: Source, text_only: bool) -> None:
    """Refuse samples that a run's new model or its collate settings cannot take.

    Args:
        where: what errors call the stage.
        collate: of the stage.
        source: of its samples.
        text_only: the new model has no vision.
    """
    for name in ("pad_targets", "packing"):
        if getattr(collate, name) and source.shares_rows:
            raise InputError(f"{where}: {name} needs a row for every sample; with kind: shapes set questions: 1")
    if text_only and source.has_videos:
        raise InputError(
            f"{where}: the model has no vision (text_only), but its data have videos or images; describe a "
            f"vision_config under model, or leave them out"
        )


def make_source(values: dict[str, Any], seed: int, where: str) -> Source:
    """The source that a stage's or evaluation's `data` describes.

    Args:
        values: its arguments, and `kind`.
        seed: unless the arguments bring one.
        where: what errors call it.
    """
    kind = values.get("kind")
    if kind not in KINDS:
        raise InputError(f"{where}: kind must be {' or '.join(KINDS)}, not {kind!r}")
    arguments = {"seed": seed, **{name: value for name, value in values.items() if name != "kind"}}
    return build(KINDS[kind], arguments, where)


def stage_seed(config: TrainingConfig, number: int) -> int:
    """Seed of a stage's data, or of the evaluation's."""
    return config.seed * SEEDS_PER_RUN + number


def stage_sources(config: TrainingConfig) -> list[Source]:
    """The sources of all stages; a missing or malformed data file is refused here, before anything is spent."""
    return [
        make_source(stage.data, stage_seed(config, number), f"stage {stage.name}: data")
        for number, stage in enumerate(config.stages)
    ]


def evaluation_source(config: TrainingConfig) -> Source | None:
    """The source of the evaluation, if there is one; what is wrong with its data is refused here too."""
    if config.evaluation is None:
        return None
    return make_source(config.evaluation.data, stage_seed(config, EVALUATION), "evaluation: data")


def resolve_epochs(config: TrainingConfig, sources: list[Source]) -> TrainingConfig:
    """The run with epochs as steps, and the warm-up in steps."""
    stages = tuple(
        stage if stage.epochs is None else replace(stage, steps=source.steps_of(stage.epochs), epochs=None)
        for stage, source in zip(config.stages, sources, strict=True)
    )
    config = replace(config, stages=stages)
    if config.warmup_share is None:
        return config
    return replace(config, warmup_steps=math.ceil(config.warmup_share * config.total_steps), warmup_share=None)


def schedule(config: TrainingConfig) -> str:
    """The stages of a resolved run as a table: what a dry run prints."""
    rows, start = [], 0
    for stage in config.stages:
        first, last = (config.learning_rate(step) for step in (start, start + stage.length - 1))
        rates = [f"{stage.learning_rate * stage.rate_ratio(part):.1e}" for part in ("tower", "projector")]
        rate = f"{stage.learning_rate:.1e} from {first:.1e}"
        rows.append((stage.name, stage.length, rate, f"{last:.1e}", *rates, ", ".join(stage.frozen) or "nothing"))
        start += stage.length
    lines = table(("stage", "steps", "learning rate", "at its end", "tower", "projector", "frozen"), rows)
    lines.append(f"\n{config.total_steps} steps, the first {config.warmup_steps} of them warm-up")
    return "\n".join(lines)
