"""Mappings and YAML files as validated dataclasses: an error names each wrong entry, and the one that was meant."""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from vidlada.errors import InputError
from vidlada.settings import check_unicode, format_value

Built = TypeVar("Built")
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")  # ${NAME} or ${NAME:-default}


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
    except InputError as error:  # of a dataclass's own check
        raise InputError(f"{where}: {error}") from error


def problems(error: ValidationError, kind: type) -> list[str]:
    """A line for each invalid entry."""
    lines = []
    for problem in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        if problem["type"] == "unexpected_keyword_argument":
            known = [entry.name for entry in fields(_kind_at(kind, problem["loc"][:-1]))]
            lines.append(f"{place}: unknown entry; {hint(str(problem['loc'][-1]), known)}")
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{place}: missing")
        else:
            lines.append(f"{place}: {problem['msg']}, got {problem['input']!r}" if place else problem["msg"])
    return lines


def hint(name: str, known: Iterable[str]) -> str:
    """What was meant by a name that is not known: the nearest one, or all there are."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"


def _kind_at(kind: Any, place: tuple[int | str, ...]) -> Any:
    """The dataclass that stands at a place in another."""
    for part in place:
        if isinstance(part, str):
            kind = next(entry.type for entry in fields(kind) if entry.name == part)
            kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
        elif get_args(kind):
            kind = get_args(kind)[0]
    return kind


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; `InputError` if the file is missing, malformed, or something else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
        check_texts(values, str(path))  # RecursionError where an alias stands within what it names
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no UTF-8, dates that are none …
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    return values


class Loader(yaml.SafeLoader):
    """YAML's own, but for 1e-5, which YAML 1.1 reads as a text."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def check_texts(value: Any, where: str) -> None:
    """Refuse halves of characters and NULs in any text of a mapping."""
    if isinstance(value, dict):
        for name, entry in value.items():
            check_texts(name, where)
            check_texts(entry, f"{where}: {format_value(name) if not str(name).isprintable() else name}")
    elif isinstance(value, list):
        for entry in value:
            check_texts(entry, where)
    elif isinstance(value, str):
        check_unicode(where, value)
        if "\0" in value:
            raise InputError(f"{where} has a NUL in {format_value(value)}; remove it")


def expand_variables(value: Any, where: str) -> Any:
    """Values with `${NAME}` and `${NAME:-default}` replaced from the environment.

    Raises:
        InputError: a variable is not set and has no default.
    """
    if isinstance(value, dict):
        return {name: expand_variables(entry, f"{where}: {name}") for name, entry in value.items()}
    if isinstance(value, list):
        return [expand_variables(entry, where) for entry in value]
    if not isinstance(value, str):
        return value

    def of(found: re.Match[str]) -> str:
        known = os.environ.get(found[1]) or found[2]
        if known is None:
            raise InputError(f"{where}: the environment variable {found[1]} is not set")
        return known

    return VARIABLE.sub(of, value)
