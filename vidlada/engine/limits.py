"""How much an engine takes on."""

from dataclasses import dataclass, field, fields
from typing import TypeVar

from vidlada.errors import InputError

Number = TypeVar("Number", int, float, None)


def limit(default: Number, text: str) -> Number:
    """A limit with its default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EngineLimits:
    """Limits of the engine. Everything is at least 1; the type of the default is the type of the limit, None a whole
    number's that the machine decides."""

    max_running: int = limit(16, "Requests decoded together.")
    max_running_tokens: int = limit(262144, "Tokens, prompts included, decoded together.")
    max_step_tokens: int = limit(512, "Tokens that answers of different cost may compute in a step together.")
    feature_store_mb: int = limit(512, "MiB of vision features kept for further questions.")
    visual_store_mb: int | None = limit(
        None,
        "MiB of the frames' keys and values kept for questions that say `reuse`; an eighth of what is free by default.",
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and not value >= 1:
                raise InputError(f"{entry.name} must be at least 1, not {value!r}")
