"""Bounds on JSON for an engine: depth and number of keys of a body, and the size of a JSON schema's grammar.

llama.cpp copies values by recursion, finds a key by comparing all keys of its object (`ordered_json`), and makes
schemas into grammars (`json-schema.cpp`, `json-schema-to-grammar.cpp`) by recursion over depth, property names, types
and references. In a grammar each optional property is followed by all later ones. A schema of 100 bytes with circular
references crashes llama.cpp; one of a kilobyte can cause 2^30 rules.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

MOST_DEPTH = 128
"""Most nested objects and arrays in a body."""
MOST_KEYS = 64 * 1024
"""Most keys of all objects in a body."""
MOST_CONTAINERS = 128 * 1024
"""Most objects and arrays in a body."""

SCHEMA_DEPTH = 64
"""Most nested objects and arrays in a schema."""
SCHEMA_NODES = 32 * 1024
"""Most objects and arrays of all schemas of a request, with references and lists of types written out."""
SCHEMA_PROPERTIES = 256
"""Most properties of one object."""
SCHEMA_SQUARES = 512 * 1024
"""Most squared properties, summed over all objects: each property is followed by all later ones."""
SCHEMA_NAME = 256
"""Most characters of one property's name."""
SCHEMA_NAMES = 8 * 1024 * 1024
"""Most characters of all rules' names. A rule's name contains the names of all properties around it."""
SCHEMA_REPEATED = 50_000
"""Most repetitions: the sum of all `minItems`, `maxItems`, `minLength`, `maxLength` and those in patterns."""
SCHEMA_ALTERNATIVES = 1024
"""Most ways in which one value can begin, over `anyOf`, `oneOf`, lists of types and references."""
SCHEMA_PATTERN = 1024
"""Most characters of a `pattern`."""

_COUNTS = (("minItems", "maxItems"), ("minLength", "maxLength"))
_COPIES = 2000
_BRACES = re.compile(r"\{\s*(\d{0,9})\s*(?:(,)\s*(\d{0,9})\s*)?\}")
_INTO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'"[]{}:')


class TooComplexError(ValueError):
    """A bound of this module is exceeded. The text continues a sentence."""


def check_shape(body: bytes) -> None:
    """Raises TooComplexError if well-formed JSON is too deep or has too many keys or containers.

    Takes 3 ms for a megabyte of prose and code, and less than 1 ms for a body with few brackets.
    """
    if body.count(b"[") + body.count(b"{") <= MOST_DEPTH and body.count(b":") <= MOST_KEYS:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    rest = b"".join(body.translate(_INTO_BRACKETS, _NOT_STRUCTURE).split(b'"')[::2])
    keys = rest.count(b":")
    if keys > MOST_KEYS:
        raise TooComplexError(f"has more than {MOST_KEYS} keys")
    rest = rest.replace(b":", b"")
    if len(rest) > 2 * MOST_CONTAINERS:
        raise TooComplexError(f"has more than {MOST_CONTAINERS} objects and arrays")
    depth = 0
    while rest:
        depth += 1
        if depth > MOST_DEPTH:
            raise TooComplexError(f"is nested more than {MOST_DEPTH} deep")
        rest = rest.replace(b"[]", b"")


class SchemaBudget:
    """Counts what all schemas of one request cost together."""

    def __init__(self) -> None:
        self._nodes = 0
        self._names = 0
        self._squares = 0
        self._repeated = 0

    def check(self, schema: object) -> None:
        """Add a schema, whose references are to parts of itself. Raises TooComplexError."""
        references: dict[str, object] = {}
        _Walk(self, schema, references).take(schema, 0, 0, 1)
        # llama.cpp builds each reference once, by its text: `0` and `00` are two.
        done = 0
        while done < len(references):
            target = list(references.values())[done]
            _Walk(self, schema, references).take(target, 0, 0, 1)
            done += 1
        _Alternatives(schema).check(references)

    def node(self, times: int, name: int) -> None:
        """Add an object or array that is written out `times` times, with a name of `name` characters."""
        self._nodes += times
        self._names += times * name
        if self._nodes > SCHEMA_NODES:
            raise TooComplexError(f"comes to more than {SCHEMA_NODES} parts once it is written out")
        if self._names > SCHEMA_NAMES:
            raise TooComplexError("has names that are too long in all")

    def properties(self, count: int, times: int) -> None:
        """Add an object with `count` properties that is written out `times` times."""
        if count > SCHEMA_PROPERTIES:
            raise TooComplexError(f"has an object of more than {SCHEMA_PROPERTIES} properties")
        self._squares += times * count * count
        if self._squares > SCHEMA_SQUARES:
            raise TooComplexError("has too many objects with too many properties")

    def repeat(self, times: int) -> None:
        """Add `times` repetitions."""
        self._repeated += times
        if self._repeated > SCHEMA_REPEATED:
            raise TooComplexError(f"repeats its parts more than {SCHEMA_REPEATED} times in all")


class _Walk:
    """Visits one schema. Treats each object in it as a schema, whether or not llama.cpp does."""

    def __init__(self, budget: SchemaBudget, root: object, references: dict[str, object]) -> None:
        self._budget = budget
        self._root = root
        self._references = references

    def take(self, value: object, depth: int, name: int, times: int) -> None:
        """Visit a value at a depth, with the length of its name, and how often it is written out."""
        if isinstance(value, dict):
            self._object(cast("dict[str, Any]", value), depth, name, times)
        elif isinstance(value, list):
            items = cast("list[object]", value)
            self._enter(depth, name, times)
            for item in items:
                self.take(item, depth + 1, name + 12, times)

    def _enter(self, depth: int, name: int, times: int) -> None:
        if depth >= SCHEMA_DEPTH:
            raise TooComplexError(f"is nested more than {SCHEMA_DEPTH} deep")
        self._budget.node(times, name)

    def _object(self, schema: dict[str, Any], depth: int, name: int, times: int) -> None:
        self._enter(depth, name, times)
        kinds: object = schema.get("type")
        if isinstance(kinds, list):
            times *= max(1, len(cast("list[object]", kinds)))
        self._budget.properties(len(schema), times)
        for lower, upper in _COUNTS:
            self._repeat(_count(schema.get(lower)) or 0, _count(schema.get(upper)), times)
        pattern: object = schema.get("pattern")
        if isinstance(pattern, str):
            self._pattern(pattern, times)
        reference: object = schema.get("$ref")
        if isinstance(reference, str):
            self._refer(reference)
        for key, value in schema.items():
            if len(key) > SCHEMA_NAME:
                raise TooComplexError(f"has a name of more than {SCHEMA_NAME} characters")
            self.take(value, depth + 1, name + len(key) + 1, times)

    def _pattern(self, pattern: str, times: int) -> None:
        if len(pattern) > SCHEMA_PATTERN:
            raise TooComplexError(f"has a pattern of more than {SCHEMA_PATTERN} characters")
        for least, comma, most in _BRACES.findall(pattern):
            upper = most if comma else least
            self._repeat(int(least or 0), int(upper) if upper else None, times)

    def _repeat(self, least: int, most: int | None, times: int) -> None:
        # llama.cpp counts from the upper to the lower bound. It never ends if the lower one is higher.
        if most is not None and least > most:
            raise TooComplexError("has a lower bound above its upper one")
        self._budget.repeat((most if most is not None and most <= _COPIES else min(least, _COPIES)) * times)

    def _refer(self, reference: str) -> None:
        if len(reference) > SCHEMA_PATTERN:
            raise TooComplexError(f"has a reference of more than {SCHEMA_PATTERN} characters")
        if reference not in self._references:
            self._references[reference] = resolved(self._root, reference)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def resolved(root: object, reference: str) -> object:
    """The value of reference `#/a/b` in a document, as llama.cpp finds it; None if it finds nothing."""
    if not reference.startswith("#/"):
        return None
    target = root
    for part in reference[2:].split("/"):
        if isinstance(target, dict):
            target = cast("dict[str, object]", target).get(part)
        elif isinstance(target, list):
            items = cast("list[object]", target)
            number = re.match(r"\s*\+?(\d{1,9})", part)
            target = items[int(number[1])] if number and int(number[1]) < len(items) else None
        else:
            return None
    return target


class _Alternatives:
    """Counts the ways in which a value can begin, through alternatives and references; others begin in one way."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._known: dict[int, int] = {}
        self._open: set[int] = set()

    def check(self, references: Mapping[str, object]) -> None:
        """Raises TooComplexError for too many, and for circular references."""
        self._everywhere(self._root)
        for target in references.values():
            self._count(target)

    def _everywhere(self, value: object) -> None:
        if isinstance(value, dict):
            self._count(cast("dict[str, object]", value))
            for part in cast("dict[str, object]", value).values():
                self._everywhere(part)
        elif isinstance(value, list):
            for part in cast("list[object]", value):
                self._everywhere(part)

    def _count(self, value: object, chain: int = 0) -> int:
        if not isinstance(value, dict):
            return 1
        schema = cast("dict[str, object]", value)
        known = self._known.get(id(schema))
        if known is not None:
            return known
        if id(schema) in self._open:
            raise TooComplexError("has a reference that leads to itself")
        if chain > 2 * SCHEMA_DEPTH:
            raise TooComplexError("has too long a chain of references")
        self._open.add(id(schema))
        total = self._sum(schema, chain + 1)
        self._open.discard(id(schema))
        if total > SCHEMA_ALTERNATIVES:
            raise TooComplexError(f"has more than {SCHEMA_ALTERNATIVES} alternatives at one place")
        self._known[id(schema)] = total
        return total

    def _sum(self, schema: dict[str, object], chain: int) -> int:
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return 1 + self._count(resolved(self._root, reference), chain)
        total = 1
        for key in ("oneOf", "anyOf", "allOf", "enum"):
            alternatives = schema.get(key)
            if isinstance(alternatives, list):
                total += sum(self._count(one, chain) for one in cast("list[object]", alternatives))
        kinds = schema.get("type")
        if isinstance(kinds, list):
            total *= max(1, len(cast("list[object]", kinds)))
        return total
