"""The values of a config.json, each checked when it is read: other programs write whole numbers where fractions are
meant, fractions for whole numbers, null for a default, and absurdly large numbers for "no limit"."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vidlada.errors import InputError

NO_LIMIT = 10**9  # a length above this is no length: transformers writes 10^30 where there is none
SHOWN_CHARACTERS = 60  # of a wrong value, in an error


class ConfigValues:
    """The object in a config.json, or one inside it.

    Args:
        values: as parsed.
        place: names the object in errors: the file, and the field where it is an inner object.
    """

    def __init__(self, values: Any, place: str):
        if not isinstance(values, Mapping):
            raise InputError(f"{place}: is {_format(values)}, and must be an object")
        self.values, self.place = values, place

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, needed: str) -> InputError:
        """The error of a field's value."""
        return InputError(f"{self.place}: {name} is {_format(self.values.get(name))}; {needed}")

    def inner(self, name: str) -> "ConfigValues":
        """An object inside this one; empty if there is none."""
        value = self.values.get(name)
        return ConfigValues({} if value is None else value, f"{self.place}: {name}")

    def optional_integer(self, name: str, least: int = 1) -> int | None:
        """A whole number; None where the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        whole = _whole(value)
        if whole is None or whole < least:
            raise self.error(name, f"it must be a whole number of at least {least}")
        return whole

    def integer(self, name: str, default: int, least: int = 1) -> int:
        """A whole number."""
        found = self.optional_integer(name, least)
        return default if found is None else found

    def length(self, name: str, default: int) -> int:
        """A greatest length; the default also where it is so large that it means no limit."""
        found = self.integer(name, default)
        return default if found > NO_LIMIT else found

    def number(self, name: str, default: float, least: float = 0.0) -> float:
        """A finite number above `least`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value) or value <= least:
            raise self.error(name, f"it must be a number above {least:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.error(name, "it must be true or false")
        return bool(value)

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "it must be a string")
        return value

    def choice(self, name: str, choices: Iterable[str], default: str) -> str:
        """One of a few strings."""
        value = self.text(name, default)
        if value not in choices:
            raise self.error(name, f"known are {', '.join(choices)}")
        return value

    def integers(self, name: str, default: Iterable[int] = ()) -> list[int]:
        """A list of whole numbers; a single one is a list of one."""
        value = self.values.get(name)
        if value is None:
            return list(default)
        found = [_whole(entry) for entry in (value if isinstance(value, list) else [value])]
        if any(entry is None for entry in found):
            raise self.error(name, "it must be a whole number or a list of them")
        return [entry for entry in found if entry is not None]

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Refuse a value that changes what the model computes in a way that is not implemented; null is always fine.

        Raises:
            InputError: the value is none of those allowed.
        """
        value = self.values.get(name)
        if value is not None and not any(value == known and _kind(value) == _kind(known) for known in allowed):
            only = " or ".join(_format(known) for known in allowed) or "null"
            raise self.error(name, f"that is not implemented; only {only} is")


def _kind(value: Any) -> type:
    """The JSON type of a value; 1 and 1.0 are one type, true and 1 are two."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _whole(value: Any) -> int | None:
    """A JSON number as an integer; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def _format(value: Any) -> str:
    """A value for an error, cut to a readable length."""
    if isinstance(value, int) and abs(value) > 10**SHOWN_CHARACTERS:
        return "a number of more than 60 digits"  # Python refuses to write the largest ones
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
