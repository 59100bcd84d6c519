"""Read JSON from an untrusted file: every value has the type and the range that the reader names.

Knows nothing of what the values mean. Duplicate keys, numbers that are not integers, and nesting
beyond what Python's parser takes are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from nexus_ext.errors import FormatError


class Fields:
    """One JSON object; `where` names it in messages."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is {_short(value)}, not an object")
        self.where = where
        self._value = value

    def error(self, key: str, what: str) -> FormatError:
        return FormatError(f"{self.where}: {key!r} {what}")

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def get(self, key: str) -> object:
        """Return a value that must be there."""
        if key not in self._value:
            raise self.error(key, "is missing")
        return self._value[key]

    def number(self, key: str, least: int, most: int) -> int:
        """Return an integer between two bounds, both included."""
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"is {_short(value)}, not an integer from {least} to {most}")
        return value

    def text(self, key: str, most: int) -> str:
        """Return a string of at most `most` characters."""
        value = self.get(key)
        if not isinstance(value, str) or len(value) > most:
            raise self.error(key, f"is {_short(value)}, not a text of up to {most} characters")
        return value

    def hexadecimal(self, key: str, digits: int) -> str:
        """Return a string of exactly so many hexadecimal digits in lower case."""
        value = self.text(key, digits)
        if len(value) != digits or set(value) - set("0123456789abcdef"):
            raise self.error(key, f"is {_short(value)}, not {digits} hexadecimal digits")
        return value

    def array(self, key: str, most: int) -> list[object]:
        """Return an array of at most `most` elements."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise self.error(key, f"is {_short(value)}, not an array of up to {most} elements")
        return value

    def texts(self, key: str, most: int, most_characters: int) -> tuple[str, ...]:
        """Return an array of different strings."""
        found: dict[str, None] = {}
        for item in self.array(key, most):
            if not isinstance(item, str) or len(item) > most_characters or item in found:
                raise self.error(key, f"holds {_short(item)}, which is no text or is there twice")
            found[item] = None
        return tuple(found)

    def objects(self, key: str, most: int) -> Iterator[Fields]:
        """Return an array of objects."""
        for index, item in enumerate(self.array(key, most)):
            yield Fields(f"{self.where}: {key}[{index}]", item)


def parse_object(where: str, encoded: bytes) -> Fields:
    """Parse an object in UTF-8; FormatError for anything else."""
    try:
        value = json.loads(
            encoded.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{where} is not valid JSON: {reason}") from None
    return Fields(where, value)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse(text: str) -> object:
    raise ValueError(f"the number {text[:32]} is not an integer")


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 64 else text[:61] + "..."
