"""JSON schemas that an answer can be made to follow: choices, and flat objects of choices, strings and integers.

A masked-diffusion model fills in what stands between fixed texts, so an object is its scaffold with a hole for every
value (`vidlada.engine.forms`), and a schema of a few values is a choice between them. What cannot be kept that way is
refused by name, since an answer that only looks like the schema would mislead.
"""

import json
from typing import Any

from vidlada.engine.forms import Form, Hole
from vidlada.serve.errors import RequestError
from vidlada.serve.refusals import unsupported_error

FIELD = "response_format"
MOST_VALUES = 100  # of a choice
MOST_PROPERTIES = 32
STRING_SLOTS, INTEGER_SLOTS = 16, 8
REMARKS = {"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions", "$comment"}
KEYS = {
    "object": {"properties", "required", "additionalProperties"},
    "string": {"enum", "const", "maxLength"},
    "integer": {"enum", "const", "minimum", "maximum"},
    "boolean": {"enum", "const"},
    "null": {"enum", "const"},
    "": {"enum", "const"},
}  # what is understood of each type
SCALARS = "string, integer, boolean, null or enum"
MOST_CHARACTERS = 20_000  # of a schema


def schema_error(where: str, reason: str) -> RequestError:
    """The refusal of a part of a schema."""
    return RequestError(422, f"{FIELD} (guided_json): {where}: {reason}", "unsupported", FIELD)


def schema_of(given: Any) -> Any:
    """The schema of a `response_format`, or of a `text.format` of `/v1/responses`; None for plain text.

    Raises:
        RequestError: it asks for JSON without a schema, or for something else.
    """
    kind = given.get("type", "text") if isinstance(given, dict) else given
    if kind == "text":
        return None
    schema = given.get("json_schema", given).get("schema") if kind == "json_schema" and isinstance(
        given.get("json_schema", given), dict) else None  # fmt: skip
    if not isinstance(schema, dict):
        raise unsupported_error(FIELD, f"{str(kind)[:80]!r} cannot be kept; give a json_schema with a schema")
    return schema


def form_of(schema: Any) -> tuple[Form, tuple[str, ...]]:
    """What an answer has to look like: a form to be filled in, or else choices.

    Raises:
        RequestError: the schema cannot be kept.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # NaN and half characters are no JSON
        raise schema_error("the schema", "it is not valid JSON") from error
    if not isinstance(schema, dict) or len(text) > MOST_CHARACTERS:
        raise schema_error("the schema", f"it must be an object of at most {MOST_CHARACTERS} characters")
    kind = check_keys(schema, "the schema")
    if kind != "object":
        hole = hole_of(schema, schema, "the schema")
        if not hole.choices:
            raise schema_error("the schema", "at its top use an object, an enum, a const or a boolean")
        return (), hole.choices
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not 0 < len(properties) <= MOST_PROPERTIES:
        raise schema_error("the schema", f"an object needs 1 to {MOST_PROPERTIES} properties")
    required = schema.get("required", [])
    for name in required if isinstance(required, list) else [required]:
        if name not in list(properties):
            raise schema_error("the schema", f"it requires {str(name)[:80]!r}, which is no property of it")
    form: list[str | Hole] = []
    for number, (name, each) in enumerate(properties.items()):
        hole = hole_of(schema, each, name)
        quote = '"' if not hole.choices and hole.kind == "string" else ""
        before = form.pop() if form else "{"
        form += [f"{before}{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: {quote}", hole, quote]
    return (*form[:-1], f"{form[-1]}}}"), ()


def hole_of(root: dict[str, Any], schema: Any, name: str) -> Hole:
    """The hole for a value."""
    where = name[:80]
    for _ in range(MOST_PROPERTIES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = resolve_reference(root, schema["$ref"], where)
    kind = check_keys(schema, where)
    values: Any = None
    if "const" in schema:
        values = [schema["const"]]
    elif "enum" in schema:
        values = schema["enum"]
    elif kind == "boolean":
        values = [True, False]
    elif kind == "null":
        values = [None]
    elif kind == "integer" and isinstance(schema.get("minimum"), int) and isinstance(schema.get("maximum"), int):
        first, last = schema["minimum"], schema["maximum"]
        values = range(first, last + 1) if last - first < MOST_VALUES else None
    if values is not None:
        if not isinstance(values, list | range) or not 0 < len(values) <= MOST_VALUES:
            raise schema_error(where, f"a choice needs 1 to {MOST_VALUES} values")
        return Hole(where, tuple(dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in values)))
    if kind == "string":
        most = schema.get("maxLength")
        if most is not None and not (isinstance(most, int) and most > 0):
            raise schema_error(where, "maxLength must be a number above 0")
        return Hole(where, slots=min(STRING_SLOTS, most or STRING_SLOTS), kind="string", most=most)
    if kind == "integer" and "minimum" not in schema and "maximum" not in schema:
        return Hole(where, slots=INTEGER_SLOTS, kind="integer")
    raise schema_error(where, "use an enum, a string, a boolean, or an integer with both bounds or none")


def resolve_reference(root: dict[str, Any], reference: Any, where: str) -> Any:
    """A definition of the schema itself."""
    found: Any = root
    for key in str(reference).removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None or not str(reference).startswith("#/"):
        raise schema_error(where, f"there is no {str(reference)[:80]!r} in the schema")
    return found


def check_keys(schema: Any, where: str) -> str:
    """The type of a schema, of which everything is understood; empty where it does not say."""
    kind = schema.get("type", "") if isinstance(schema, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise schema_error(where, f"type {str(kind)[:80]!r} cannot be kept; at the top use object, else {SCALARS}")
    unknown = sorted(map(str, set(schema) - REMARKS - KEYS[kind] - {"type"}))
    if unknown:
        raise schema_error(where, f"{unknown[0][:80]!r} cannot be kept")
    return kind
