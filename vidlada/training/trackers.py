"""Where figures go besides the terminal: TensorBoard, Weights & Biases, trackio."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from vidlada.training.config import TrainingConfig

PROJECT = "vidlada"
LOGS = "logs"  # folder of TensorBoard's files, within the run's


def start_tracker(accelerator: Accelerator, config: TrainingConfig, facts: dict[str, int]) -> None:
    """Begin to track a run under its name, with its config.

    Args:
        accelerator: has the tracker that `config` names.
        config: of the run; its `name` is that of its output folder by default.
        facts: what else is known of the run before its first step.
    """
    values = {**plain(asdict(config)), **facts}
    name = config.name or Path(config.output).resolve().name
    if config.tracker == "tensorboard":
        accelerator.init_trackers(LOGS, {"name": name, **flat(values)})
        if accelerator.is_main_process:
            writer = accelerator.get_tracker("tensorboard", unwrap=True)
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            writer.add_text("config", f"# {name}\n\n" + "".join(f"    {line}\n" for line in text.splitlines()))
            writer.flush()
    elif config.tracker != "none":
        accelerator.init_trackers(PROJECT, values, {config.tracker: {"name": name}})


def plain(value: Any) -> Any:
    """Settings as mappings, lists, numbers and texts."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def flat(value: Any, name: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by their places, as `stages.0.learning_rate`: TensorBoard takes single values only."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            place: leaf for key, entry in entries for place, leaf in flat(entry, f"{name}.{key}".lstrip(".")).items()
        }
    return {name: "none" if value is None else value}
