"""Typed access to the fields of a JSON object, with errors that name the field.

Knows nothing of what the fields mean. Unknown fields are errors too: in a profile that was
written by hand, a misspelt optional field would else be ignored without a word.
"""

from __future__ import annotations

import json
import math

from nexus_ext.errors import FormatError

_HINT = "Correct that field, or write a fresh profile with the hardware probe."
_LARGEST = (1 << 63) - 1


def parse_object(text: str, where: str) -> Fields:
    """Return the fields of the JSON object in `text`; `where` names it in errors."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}", hint=_HINT) from error
    return Fields(value, where)


class Fields:
    """One JSON object. Each field is taken once; `finish` complains about what is left."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is {_show(value)}, which is not an object", hint=_HINT)
        self._values: dict[str, object] = dict(value)
        self._where = where

    def integer(self, name: str, *, minimum: int = 0, default: int | None = None) -> int:
        """Return a whole number of at least `minimum`; an absent one is an error or `default`."""
        if default is not None and name not in self._values:
            return default
        return self._integer(name, self._take(name), minimum)

    def optional_integer(self, name: str, *, minimum: int = 0) -> int | None:
        """Return a whole number, or None when the field is null or absent."""
        value = self._values.pop(name, None)
        return None if value is None else self._integer(name, value, minimum)

    def rate(self, name: str) -> float:
        """Return a finite number above zero."""
        return self._rate(name, self._take(name))

    def optional_rate(self, name: str) -> float | None:
        """Return a finite number above zero, or None when the field is null or absent."""
        value = self._values.pop(name, None)
        return None if value is None else self._rate(name, value)

    def text(self, name: str, *, default: str | None = None) -> str:
        """Return a string."""
        if default is not None and name not in self._values:
            return default
        value = self._take(name)
        if not isinstance(value, str):
            raise self.error(name, value, "not a string")
        return value

    def boolean(self, name: str) -> bool:
        """Return true or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            raise self.error(name, value, "neither true nor false")
        return value

    def optional_boolean(self, name: str) -> bool | None:
        """Return true, false, or None when the field is null or absent."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.boolean(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self._list(name)
        for value in values:
            if not isinstance(value, str):
                raise self.error(name, values, "not a list of strings")
        return tuple(str(value) for value in values)

    def nested(self, name: str) -> Fields:
        """Return the fields of a nested object."""
        return Fields(self._take(name), f"{self._where}: {name}")

    def nested_list(self, name: str) -> list[Fields]:
        """Return the fields of each object in a list."""
        values = self._list(name)
        return [Fields(value, f"{self._where}: {name}[{i}]") for i, value in enumerate(values)]

    def finish(self) -> None:
        """Raise FormatError when the object holds a field that nobody asked for."""
        for name in self._values:
            raise FormatError(f"{self._where} has the unknown field {name!r}", hint=_HINT)

    def error(self, name: str, value: object, why: str) -> FormatError:
        """Return the error for a field whose value cannot be used."""
        return FormatError(f"{self._where}: {name} is {_show(value)}, {why}", hint=_HINT)

    def _take(self, name: str) -> object:
        if name not in self._values:
            raise FormatError(f"{self._where} has no field {name!r}", hint=_HINT)
        return self._values.pop(name)

    def _list(self, name: str) -> list[object]:
        value = self._take(name)
        if not isinstance(value, list):
            raise self.error(name, value, "not a list")
        return value

    def _integer(self, name: str, value: object, minimum: int) -> int:
        # bool is a subclass of int, and true is not a size.
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, value, "not a whole number")
        if not minimum <= value <= _LARGEST:
            raise self.error(name, value, f"not between {minimum} and {_LARGEST}")
        return value

    def _rate(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, value, "not a number")
        if not (0 < value <= _LARGEST and math.isfinite(value)):
            raise self.error(name, value, f"not above 0 and up to {_LARGEST}")
        return float(value)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
