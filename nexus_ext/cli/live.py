"""A line of progress on a terminal, that never mixes with the text that is being written.

Progress goes to stderr and only to a terminal. It is written behind the cursor, which is put back,
so that text on the same terminal goes on where it stopped; before that text, it is erased. The
cursor is never hidden and no mode of the terminal is changed: nothing is left behind.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from nexus_ext.cli.output import Output, is_terminal, write

_SAVE, _RESTORE, _ERASE, _DIM, _NORMAL = "\x1b7", "\x1b8", "\x1b[J", "\x1b[2m", "\x1b[22m"
_INTERVAL_S: Final = 0.1
_LEAST_ROOM: Final = 24  # columns; with less, progress waits for the next line


class Live:
    """Text of an answer, and progress beside it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._on = output.mode == "human" and is_terminal(sys.stderr)
        self._same_screen = self._on and sys.stdout.isatty()
        self._lock = threading.RLock()
        self._column = 0
        self._shown = False
        self._next_s = 0.0

    def text(self, text: str) -> None:
        """Write a part of the answer."""
        with self._lock:
            self.clear()
            self._output.text(text)
            if self._same_screen:
                self._column = column_after(self._column, text, _columns())

    def end_line(self) -> None:
        """Be at the beginning of a line."""
        with self._lock:
            self.clear()
            if self._column:
                self.text("\n")

    def status(self, text: str) -> None:
        """Show progress, unless it was shown a moment ago."""
        now = time.monotonic()
        with self._lock:
            if not self._on or now < self._next_s:
                return
            self._next_s = now + _INTERVAL_S
            gap = 2 if self._column else 0
            room = _columns() - self._column - gap - 1
            if room < _LEAST_ROOM:
                return
            shown = " " * gap + text[:room]
            write(sys.stderr, f"{_ERASE}{_SAVE}{_DIM}{shown}{_NORMAL}{_RESTORE}")
            self._shown = True

    def clear(self) -> None:
        """Take the progress away."""
        with self._lock:
            if self._shown:
                write(sys.stderr, _ERASE)
                self._shown = False

    @contextmanager
    def ticking(self, describe: Callable[[], str]) -> Iterator[None]:
        """Within the block, show what `describe` returns several times a second."""
        if not self._on:
            yield
            return
        done = threading.Event()

        def tick() -> None:
            while not done.wait(2 * _INTERVAL_S):
                self.status(describe())

        thread = threading.Thread(target=tick, name="nexus-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.clear()


def column_after(column: int, text: str, columns: int) -> int:
    """Return the column of the cursor after `text` on a terminal of `columns`."""
    _, newline, rest = text.rpartition("\n")
    column = 0 if newline else column
    for character in rest:
        if character == "\t":
            width = 8 - column % 8
        elif unicodedata.combining(character) or not character.isprintable():
            width = 0
        else:
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        column = column + width if column + width <= columns else width
    return column


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
