"""Settings listed once: the default, help text and bounds of each stand with its field, for Python, the command line
and the server."""

from collections.abc import Container, Iterator
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vidlada.errors import InputError

INT64 = 2**63


@dataclass(frozen=True)
class Setting:
    """Help text and bounds of a setting.

    Attributes:
        help: one sentence, as the command line prints it.
        minimum, maximum: bounds of a number, inclusive; NaN and infinity are never allowed.
        above: exclusive lower bound.
        choices: the texts allowed; of a number, those allowed instead of one.
        max_length: most characters of a text, or of each text.
        max_items: most entries of a list.
        essential: among the options a newcomer needs first.
        metavar: what the command line calls the value.
        alias: name outside the dataclass, if it is another.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    max_length: int | None = None
    max_items: int | None = None
    essential: bool = False
    metavar: str | None = None
    alias: str | None = None


def setting(default: Any, help: str, **rest: Any) -> Any:
    """A dataclass field with a `Setting`; `rest` are the attributes of it."""
    return field(default=default, metadata={"setting": Setting(help, **rest)})


def settings_of(cls: Any) -> dict[str, tuple[Field[Any], Setting, type]]:
    """The listed settings of a dataclass: field, `Setting` and type (of the entries, for a list; never `None`)."""
    hints = get_type_hints(cls)
    found = {}
    for entry in fields(cls):
        if "setting" in entry.metadata:
            found[entry.name] = (entry, entry.metadata["setting"], value_type(hints[entry.name]))
    return found


def value_type(hint: Any) -> type:
    """int, float, bool or str from a type hint such as `int | None` or `tuple[str, ...]`."""
    if get_origin(hint) in (Union, UnionType):
        return value_type(next(kind for kind in get_args(hint) if kind is not NoneType))
    if get_origin(hint) is tuple:
        return value_type(get_args(hint)[0])
    return hint if hint in (int, float, bool) else str


def check_settings(instance: Any, skip: Container[str] = ()) -> None:
    """Check every listed setting of a dataclass against its type and bounds, but for those in `skip`.

    Raises:
        InputError: a value is of another type or out of bounds; the message names the setting and the value.
    """
    for name, (entry, bounds, kind) in settings_of(type(instance)).items():
        value = getattr(instance, name)
        name = bounds.alias or name
        if name in skip or value is None and entry.default is None:
            continue
        if isinstance(entry.default, tuple):
            check_list(name, value, bounds)
        elif kind is str:
            check_text(name, value, bounds)
        elif bounds.choices and isinstance(value, str):
            if value not in bounds.choices:
                raise InputError(f"{name} must be a number or {' or '.join(bounds.choices)}, not {format_value(value)}")
        elif kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"{name} must be true or false, not {format_value(value)}")
        else:
            check_number(name, value, kind, bounds)


def check_number(name: str, value: Any, kind: type, bounds: Setting) -> None:
    """Raise an error unless a value is a finite number within its bounds."""
    whole = kind is int
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if fits and bounds.minimum is not None:
        fits = value >= bounds.minimum
    if fits and bounds.above is not None:
        fits = value > bounds.above
    if fits:
        fits = value <= (INT64 if bounds.maximum is None else bounds.maximum) and value == value
    if not fits:
        raise InputError(
            f"{name} must be {'a whole number' if whole else 'a number'}{limits(bounds)}, not {format_value(value)}"
        )


def limits(bounds: Setting) -> str:
    """Describe the bounds of a number."""
    lower = "" if bounds.minimum is None else f" of at least {bounds.minimum:g}"
    lower = lower if bounds.above is None else f" above {bounds.above:g}"
    upper = "" if bounds.maximum is None else f" of at most {bounds.maximum:,}"
    return f"{lower} and{upper.removeprefix(' of')}" if lower and upper else lower + upper


def check_text(name: str, value: Any, bounds: Setting) -> None:
    """Raise an error unless a value is valid Unicode text, not too long, and one of the choices."""
    if isinstance(value, str) and bounds.choices and value not in bounds.choices:
        raise InputError(f"{name} must be {' or '.join(bounds.choices)}, not {format_value(value)}")
    check_unicode(name, value)
    if bounds.max_length is not None and len(value) > bounds.max_length:
        raise InputError(f"{name} may have at most {bounds.max_length:,} characters, not {len(value):,}")


def check_unicode(name: str, text: Any) -> None:
    """Raise an error for what is no text, and for lone surrogates, which no tokenizer or file can encode."""
    if not isinstance(text, str):
        raise InputError(f"{name} must be a text, not {format_value(text)}")
    if problem := half_character(text):
        raise InputError(f"{name} has {problem}; remove it")


def half_character(text: str) -> str:
    """Describe the first lone surrogate of a text and where it is; empty if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        # what decoding with `surrogateescape` leaves of other encodings
        what = "a byte that is not UTF-8" if "\udc80" <= half <= "\udcff" else "half a character"
        return f"{what} at position {error.start} ({half!a})"
    return ""


def texts_of(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """All texts in a value, keys included, with the name of each for messages."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield "a name", key
            yield from texts_of(inner, f"{name}.{key}" if name else repr(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from texts_of(inner, f"{name}[{number}]")


def as_sequence(value: Any) -> Any:
    """A text as a list of it alone, which a text would otherwise be of its letters; anything else as it is."""
    return (value,) if isinstance(value, str) else value


def check_list(name: str, values: Any, bounds: Setting) -> None:
    """Raise an error unless a value is a list of such texts."""
    if not isinstance(values, list | tuple):
        raise InputError(f"{name} must be a text or a list of texts, not {format_value(values)}")
    if bounds.max_items is not None and len(values) > bounds.max_items:
        raise InputError(f"{name} may have at most {bounds.max_items} entries, not {len(values)}")
    for value in values:
        check_text(name, value, bounds)


def format_value(value: Any) -> str:
    """Format any value for an error message, shortened."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
