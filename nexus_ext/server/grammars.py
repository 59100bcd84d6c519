"""Grammars that a client sends, looked at before llama.cpp gets them.

llama.cpp's reader is recursive and ends the process where a grammar is nested some ten thousand
deep; a NUL that a grammar asks for is an exception that nobody catches. Both were tried. What is
wrong otherwise is refused by llama.cpp itself.
"""

from __future__ import annotations

from typing import Final

from nexus_ext.errors import UsageError

MAX_CHARACTERS: Final = 1 << 18
MAX_DEPTH: Final = 2000
MAX_REPEAT: Final = 10_000

_NULS: Final = ("x00", "u0000", "U00000000")


def check_grammar(text: str) -> None:
    """Raise UsageError for a GBNF grammar that would harm the process."""
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"has {len(text)} characters, more than {MAX_CHARACTERS}")
    depth, place, end = 0, 0, len(text)
    while place < end:
        sign = text[place]
        if sign in '"[':
            place = _skip(text, place)
            continue
        if sign == "#":
            line = text.find("\n", place)
            place = end if line < 0 else line
            continue
        if sign == "(":
            depth += 1
            if depth > MAX_DEPTH:
                raise _refused(f"is nested more than {MAX_DEPTH} deep")
        elif sign == ")":
            depth -= 1
        elif sign == "{":
            close = text.find("}", place)
            numbers = text[place + 1 : close].split(",") if close >= 0 else []
            for number in map(str.strip, numbers):
                if number.isdigit() and (len(number) > 9 or int(number) > MAX_REPEAT):
                    raise _refused(f"repeats {number[:20]} times, more than {MAX_REPEAT}")
        place += 1


def _skip(text: str, start: int) -> int:
    """Return the place behind a text or a class of characters. Raises UsageError for a NUL."""
    close = '"' if text[start] == '"' else "]"
    negated = text.startswith("[^", start)
    place = start + 1
    while place < len(text) and text[place] != close:
        if text[place] == "\\":
            place += 1
            if not negated and text.startswith(_NULS, place):
                raise _refused("asks for the character NUL")
        elif text[place] == "\0":
            raise _refused("holds the character NUL")
        place += 1
    return place + 1


def _refused(what: str) -> UsageError:
    return UsageError(f"the grammar {what}", hint="make it simpler: a schema becomes a grammar too")
