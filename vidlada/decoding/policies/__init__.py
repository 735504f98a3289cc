"""Cache policies by name: `dual`, `interval:prompt=25,response=7`, `mars:ratio=2`."""

from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from vidlada.decoding.policies.base import Policy
from vidlada.decoding.policies.blockwise import Dual, Frozen, Full, Interval, Prefix
from vidlada.decoding.policies.mars import Mars
from vidlada.decoding.policies.sparse import Sparse
from vidlada.errors import InputError
from vidlada.generation import CachePolicy

POLICIES: dict[str, type] = {kind.name: kind for kind in (Full, Prefix, Dual, Frozen, Interval, Sparse, Mars)}


def parse_policy(cache: str | CachePolicy) -> Policy | None:
    """A policy from its name and settings; None for `none`. The only place where they are read.

    Args:
        cache: `name` or `name:setting=value,…`; a policy is returned as it is.

    Raises:
        InputError: an unknown name or setting, or a value out of range.
    """
    if not isinstance(cache, str):
        return cast(Policy, cache)
    name, _, rest = cache.partition(":")
    if name == "none" and not rest:
        return None
    if name not in POLICIES:
        raise InputError(f"unknown cache {name!r}; use none, {', '.join(POLICIES)}")
    kind = POLICIES[name]
    known = [entry.name for entry in fields(kind) if entry.default is not MISSING]
    kinds = get_type_hints(kind)
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise InputError(f"cache {name} has no setting {key!r}; known: {', '.join(known) or 'none'}")
        settings[key] = parse_value(f"cache {name}: {key}", value, kinds[key])
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
        raise InputError(f"{what} must be {expected}, not {value!r}") from error
