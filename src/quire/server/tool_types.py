"""What JSON a tool's schema asks of an argument that is written as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

Types = frozenset[str]
STRING: Types = frozenset(("string",))
ALL: Types = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
# Where a schema leaves it open: a text that merely looks like a number is one of the model's words.
OPEN: Types = frozenset(("string", "object", "array"))
# As templates write these values of earlier calls, and models then do too.
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_MAX_DEPTH = 16  # of references and alternatives


def property_of(schema: Mapping[str, Any] | None, name: str) -> Any:
    """The schema of an object's property."""
    properties = (schema or {}).get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return (schema or {}).get("additionalProperties", True)


def types_of(schema: Any, root: Mapping[str, Any] | None) -> Types:
    """The types that a schema allows. `root` is what its references are of."""
    return _types(schema, root or {}, _MAX_DEPTH) or OPEN


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a schema that is but a reference refers to; itself if it is none, None if there is nothing there."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        reference: str = schema["$ref"]
        if not reference.startswith("#"):
            return None
        schema = root
        for key in reference[1:].split("/")[1:]:
            schema = schema.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(schema, Mapping) else None
    return None


def json_of(text: str, types: Types) -> str:
    """An argument's text as JSON: as it is if it is JSON of one of these types, otherwise as a string."""
    stripped = text.strip()
    if "string" not in types:
        stripped = _PYTHON.get(stripped, stripped)
    if (types - STRING) & _kinds(stripped):
        return stripped
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> Types | None:
    """As types_of; None where the schema leaves it open."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth:
        return None
    found: Types | None = None
    if isinstance(schema.get("type"), str | list):
        given = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        found = frozenset(one for one in given if isinstance(one, str)) & ALL or None
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list):
            found = _both(found, frozenset().union(*map(_kinds_of, values)))
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            branches = [_types(branch, root, depth - 1) for branch in schema[word]]
            found = _both(found, frozenset().union(*(branch or OPEN for branch in branches)))
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found = _both(found, _types(branch, root, depth - 1))
    return found


def _both(one: Types | None, other: Types | None) -> Types | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _kinds(text: str) -> Types:
    """The types that a JSON text has; none if it is not JSON."""
    try:
        return _kinds_of(json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return frozenset()


def _kinds_of(value: Any) -> Types:
    """A value's type, and for a whole number its two."""
    if isinstance(value, bool):
        return frozenset(("boolean",))
    if isinstance(value, int | float):
        return frozenset(("integer", "number") if value == value // 1 else ("number",))
    for kind, name in ((str, "string"), (Mapping, "object"), (list, "array")):
        if isinstance(value, kind):
            return frozenset((name,))
    return frozenset(("null",))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
