"""How parts of a model may be laid out and divided; torch is not needed to check it."""

from typing import Any, Literal

from vidlada.errors import InputError

NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]
PoolMode = Literal["bilinear", "average", "max"]


def check_division(settings: Any, whole: str, parts: str) -> None:
    """Refuse a size that is given with a number of parts that does not divide it."""
    size, count = getattr(settings, whole), getattr(settings, parts)
    if size is not None and count is not None and size % count:
        raise InputError(f"{whole} {size} is not divisible by {parts} {count}")
