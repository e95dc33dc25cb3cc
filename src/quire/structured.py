"""What a request's text must be like, when it may not be just any: one JSON schema, regular expression, list of choices or grammar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError

MAX_STRUCTURED_CHARACTERS = 2**17  # of a schema, of a grammar, of all choices together
MAX_REGEX_CHARACTERS = 2**14
MAX_CHOICES = 1024
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"  # between the parts of a JSON text: a new line and an indent, and no more
ESCAPES = 'nrbtf\\"'  # what may follow a backslash in a JSON string that is written
LEAST, MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")  # the bounds of numbers
MAX_SCHEMA_DEPTH = 64  # of the schema's own brackets; the text it describes may nest as deep as its references say


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StructuredOutput:
    """The form of a request's text; exactly one field is given. Kept as immutable text, so that equal ones are compiled once.

    Fields:
        json_object: any JSON object.
        json_schema: a JSON schema, as a mapping, a boolean or JSON text; properties come in the schema's order. What no text could be held to is
            refused by name; `date` and `time` are held to their digits, not to the calendar (a 29th of February, a leap second in any minute).
        regex: the whole text matches this regular expression (no look-around, no back-references; `.` does not match a new line).
        choice: the text is one of these strings.
        grammar: a Lark grammar with a rule `start`, as llguidance reads it; special tokens are written `<|name|>`.

    Raises:
        InvalidRequestError: none or several are given, or one is too large, too deep or no text at all. Whether it can be satisfied is found
            out when a request with it is submitted.
    """

    json_object: bool = False
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise InvalidRequestError("structured.json_object", self.json_object, "True or False")
        given = [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if self.json_object:
            given.insert(0, "json_object")
        if len(given) != 1:
            raise InvalidRequestError("structured", " and ".join(given) or "nothing", "one of json_object, json_schema, regex, choice and grammar")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        _text("structured.regex", self.regex, MAX_REGEX_CHARACTERS)
        _text("structured.grammar", self.grammar, MAX_STRUCTURED_CHARACTERS)

    def __repr__(self) -> str:
        name = next(name for name in self.__slots__ if getattr(self, name) not in (None, False))
        return f"StructuredOutput({name}={getattr(self, name)!r})"

    @property
    def source(self) -> tuple[str, str]:
        """("json", schema), ("regex", expression) or ("lark", grammar): every form as one of three."""
        if self.json_object:
            return "json", spaced({"type": "object"})
        if self.json_schema is not None:
            return "json", spaced(json.loads(str(self.json_schema)))
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            # One terminal of all of them: the lexer decides between any number at once. JSON's escapes are Lark's.
            return "lark", "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, self.choice))
        assert self.grammar is not None
        return "lark", self.grammar


def spaced(schema: Any) -> str:
    """A JSON schema as text, with bounds to white space: a model that is not sure what comes next likes to say that in it, without end.

    Nor is a character written as its number, which none needs but control characters: "\\u0061" would be another name than "a" to llguidance, and the
    same to who reads the object.

    Raises:
        InvalidRequestError: the schema asks for something that llguidance takes and does not keep to.
    """
    _check_kept(schema, "structured")
    schema = {} if schema is True else schema
    options = schema.get("x-guidance", {}) if isinstance(schema, Mapping) else None
    escapes = ESCAPES + "u" * (re.search(r"\\u00[01]|\x7f", json.dumps(schema)) is not None)
    ours = {"whitespace_pattern": WHITE_SPACE, "json_allowed_escapes": escapes}
    return json.dumps({**schema, "x-guidance": {**options, **ours}} if isinstance(options, dict) else schema)


def _check_kept(schema: Any, field: str, *, literal: bool = False) -> None:
    """Refuse, in a schema or a part of one, what llguidance would let a text break. `literal` inside `const` and `enum`."""
    inside = schema.items() if isinstance(schema, Mapping) else [("", one) for one in schema] if isinstance(schema, list) else []
    for key, one in inside:
        if isinstance(one, int) and (literal or key in ("const", *LEAST, *MOST)) and _loses_digits(key, one):
            raise InvalidRequestError(field, f"{key} {one}".strip(), "an integer of which a double loses no digit: all up to 2**53 are")
        _check_kept(one, field, literal=literal or key in ("const", "enum"))
    if not isinstance(schema, Mapping):
        return
    required = schema.get("required")
    most = 1 + (len(set(map(str, required))) if isinstance(required, list) else 0)
    for least in _numbers(schema, "minProperties"):
        if least > most:  # an open name may come twice, and is one property then
            raise InvalidRequestError(field, f"minProperties {least}", f"at most {most} here, one more than there are required ones")
    # A whole number that is the end, nearer to 0, of an interval without another one is taken for a part of it.
    low, high = max(_numbers(schema, *LEAST), default=-math.inf), min(_numbers(schema, *MOST), default=math.inf)
    if low in _numbers(schema, "exclusiveMinimum") and low >= 0 and low % 1 == 0 and low < high < low + 1:
        raise InvalidRequestError(field, f"exclusiveMinimum {low}", f"a minimum, where no whole number lies between it and {high}")
    if high in _numbers(schema, "exclusiveMaximum") and high <= 0 and high % 1 == 0 and high - 1 < low < high:
        raise InvalidRequestError(field, f"exclusiveMaximum {high}", f"a maximum, where no whole number lies between {low} and it")


def _numbers(schema: Mapping[str, Any], *keys: str) -> list[float]:
    return [one for key in keys if isinstance(one := schema.get(key), int | float) and not isinstance(one, bool)]


def _loses_digits(key: str, number: int) -> bool:
    """Whether llguidance, which has doubles, writes or bounds by another number. It keeps integers within 64 bits: bounds beyond say nothing."""
    if key in MOST and number >= 2**63 - 1 or key in LEAST and number <= -(2**63):
        return False
    return abs(number) >= 2**63 or int(float(number)) != number


def _text(field: str, value: object, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(field, value, "a string that is not empty")
    if len(value) > most:
        raise InvalidRequestError(field, f"{len(value)} characters", f"at most {most} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(field, value, "a string that UTF-8 can encode") from None


def _choices(choice: Sequence[str]) -> tuple[str, ...]:
    strings = () if isinstance(choice, str) or not isinstance(choice, Sequence) else tuple(choice)
    if not 1 <= len(strings) <= MAX_CHOICES:
        raise InvalidRequestError("structured.choice", choice, f"a list of 1 to {MAX_CHOICES} strings")
    for string in strings:
        if string is None:
            raise InvalidRequestError("structured.choice", string, "a string that is not empty")
        _text("structured.choice", string, MAX_STRUCTURED_CHARACTERS)
    _text("structured.choice", "".join(strings), MAX_STRUCTURED_CHARACTERS)
    return strings


def _schema_text(schema: Mapping[str, Any] | bool | str) -> str:
    field, limit = "structured.json_schema", "a JSON schema, as a mapping or JSON text"
    try:
        if not isinstance(schema, str):
            if not isinstance(schema, Mapping | bool):
                raise InvalidRequestError(field, schema, limit)
            schema = json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, allow_nan=False)
        _text(field, schema, MAX_STRUCTURED_CHARACTERS)
        parsed = json.loads(schema, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidRequestError(field, f"{type(schema).__name__} of great depth", f"at most {MAX_SCHEMA_DEPTH} levels deep") from None
    except InvalidRequestError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, schema, f"{limit} ({error})") from None
    if not isinstance(parsed, dict | bool):
        raise InvalidRequestError(field, schema, limit)
    level: list[Any] = [parsed]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        level = [child for value in level if isinstance(value, dict | list) for child in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise InvalidRequestError(field, schema, f"at most {MAX_SCHEMA_DEPTH} levels deep")
    _check_kept(parsed, field)
    return schema


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
