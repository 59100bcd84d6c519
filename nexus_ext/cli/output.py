"""The one place that writes: human text, one JSON document, or next to nothing.

A command gets an `Output` and tells it results, tables, notes and progress; which of them appear,
and where, is decided here. Answers go to stdout, everything about them to stderr, so that
`nexus run ... > file` holds the answer and nothing else. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import IO, Literal

from nexus_ext.errors import NexusError

Mode = Literal["human", "json", "quiet"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line feed and tab
_MAX_WIDTH = 120
_RICH_ROWS = 200  # laying out more rows than this takes rich longer than reading a model's header


class Output:
    """What commands write through. `mode` says for whom: a person, a program, or nobody."""

    def __init__(self, mode: Mode = "human", *, debug: bool = False) -> None:
        self.mode = mode
        self.debug = debug

    # -- stdout ---------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        """Write a part of an answer as it is, at once. JSON output has it in its `result`."""
        if self.mode != "json" and text:
            write(sys.stdout, visible(text) if sys.stdout.isatty() else text)

    def line(self, text: str = "") -> None:
        """Write a line for people."""
        if self.mode == "human":
            write(sys.stdout, visible(text) + "\n")

    def heading(self, text: str) -> None:
        """Write the title of what follows."""
        if self.mode == "human":
            write(sys.stdout, f"\n{_styled(text, '1', sys.stdout)}\n")

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write "name  value" lines, the values under each other."""
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(f"{name:<{width}}  {value}".rstrip())

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, total: bool = False
    ) -> None:
        """Write a table for people. A column whose title starts with ">" is set flush right.

        With `total` the last row is set off as the sum of the others.
        """
        if self.mode != "human":
            return
        cells = [[visible(cell) for cell in row] for row in rows]
        lay_out = _plain_table if len(cells) > _RICH_ROWS else _rich_table
        write(sys.stdout, lay_out(columns, cells, total))

    def result(self, value: object) -> None:
        """Write the result of a command as JSON; people have seen it already."""
        if self.mode == "json":
            write(sys.stdout, json_text(value))

    def ask(self, prompt: str) -> str:
        """Return a line that a person types, with editing on a terminal. EOFError at the end."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and arrow keys
        try:
            return input(prompt)
        except EOFError:
            write(sys.stdout, "\n")
            raise

    # -- stderr ---------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Tell people something about the answer."""
        if self.mode == "human":
            write(sys.stderr, visible(text) + "\n")

    def error(self, error: NexusError) -> None:
        """Report what ended the command: a sentence and what to do about it."""
        if self.mode == "json":
            write(sys.stdout, json_text({"error": error_fields(error)}))
            return
        write(sys.stderr, f"{_styled('error:', '1;31', sys.stderr)} {visible(str(error))}\n")
        if error.hint:
            write(sys.stderr, f"{_styled('hint:', '1', sys.stderr)} {visible(error.hint)}\n")


def error_fields(error: NexusError) -> dict[str, object]:
    """Return what JSON output says of an error: code, message, hint and its own attributes."""
    fields: dict[str, object] = {"code": error.code, "message": str(error), "hint": error.hint}
    for name, value in vars(error).items():
        if name not in fields and isinstance(value, (str, int, float)):
            fields[name] = value
    # OSError keeps it outside of the instance's dictionary.
    errno = getattr(error, "errno", None)
    if isinstance(errno, int):
        fields["errno"] = errno
    return fields


def json_text(value: object) -> str:
    """Return `value` as JSON text that every parser reads: infinite and undefined become null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        # Lone surrogates (undecodable bytes of a path) have no place in UTF-8.
        return value.encode("utf-8", "replace").decode()
    return value


def visible(text: str) -> str:
    """Return `text` with control characters spelled out.

    Names in a model file and answers of a model come from others: they must not move the cursor.
    """
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class OutputLost(Exception):
    """What stdout or stderr goes to takes no more: a disk that is full, for instance."""


def write(stream: IO[str], text: str) -> None:
    """Write at once, whatever encoding the stream has. BrokenPipeError is the caller's.

    Raises OutputLost for everything else that the system says.
    """
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"the output cannot be written: {error.strerror}") from error


def is_terminal(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that understands control sequences."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _has_color(stream: IO[str]) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def _styled(text: str, code: str, stream: IO[str]) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if _has_color(stream) else text


def _width() -> int:
    if not sys.stdout.isatty():
        return _MAX_WIDTH
    return min(os.get_terminal_size(sys.stdout.fileno()).columns, _MAX_WIDTH)


def _rich_table(columns: Sequence[str], rows: list[list[str]], total: bool) -> str:
    """Lay out with rich, into a text: the writing is ours, so that a broken pipe is, too."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title in columns:
        flush_right = title.startswith(">")
        table.add_column(title.lstrip(">"), justify="right" if flush_right else "left")
    for number, row in enumerate(rows, 1):
        last = total and number == len(rows)
        table.add_row(*map(Text, row), style="bold" if last else None)
        if total and number == len(rows) - 1:
            table.add_section()
    page = io.StringIO()
    color = _has_color(sys.stdout)
    console = Console(
        file=page, width=_width(), force_terminal=color, no_color=not color, highlight=False
    )
    console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def _plain_table(columns: Sequence[str], rows: list[list[str]], total: bool) -> str:
    cells = [[title.lstrip(">") for title in columns], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        parts = (
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for title, cell, width in zip(columns, row, widths, strict=True)
        )
        lines.append("  ".join(parts).rstrip() + "\n")
    return "".join(lines)
