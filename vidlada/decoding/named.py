"""Things chosen by name and settings in one text: `mars:ratio=2`, `credit:decay=0.8`. The only place where such texts
are read."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from vidlada.errors import InputError
from vidlada.settings import check_settings, format_value


def parse_named(what: str, text: str, table: Mapping[str, type], others: Sequence[str] = ()) -> Any:
    """An instance of one of several dataclasses.

    Args:
        what: is chosen, for messages: `cache`.
        text: `name` or `name:setting=value,…`; a class may also have `presets`, which stand there without a value.
        table: name → dataclass.
        others: further names that messages list.

    Raises:
        InputError: an unknown name or setting, or a value out of range.
    """
    name, _, rest = text.partition(":")
    if name not in table:
        raise InputError(f"unknown {what} {format_value(name)}; use {', '.join([*others, *table])}")
    kind = table[name]
    known = [entry.name for entry in fields(kind) if entry.init and entry.default is not MISSING]
    kinds, presets = get_type_hints(kind), getattr(kind, "presets", {})
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals and key in presets:
            settings = presets[key] | settings  # wherever it stands, what is set by name counts
        elif key in known:
            settings[key] = parse_value(f"{what} {name}: {key}", value, kinds[key])
        else:
            choices = ", ".join([*known, *presets]) or "none"
            raise InputError(f"{what} {name} has no setting {format_value(key)}; known: {choices}")
    return kind(**settings)


def parse_value(what: str, value: str, kind: type) -> Any:
    """A setting's value from text."""
    (kind,) = set(get_args(kind) or (kind,)) - {NoneType}  # None stands for a default that depends on the video
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError) as error:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{what} must be {expected}, not {format_value(value)}") from error


def check_named(what: str, instance: Any) -> None:
    """Check the listed settings of an instance; the message names what it is."""
    try:
        check_settings(instance)
    except InputError as error:
        raise InputError(f"{what} {instance.name}: {error}") from error
