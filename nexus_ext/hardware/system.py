"""The files and commands through which an operating system describes its machine.

The only place of the probe that reads /proc and /sys and runs commands. Knows nothing of what
the texts mean; tests put a directory of captured files in the place of the real root.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_log = logging.getLogger("nexus_ext.hardware")

_COMMAND_TIMEOUT_S = 10.0


class System:
    """A machine as seen through its files and commands. `root` replaces "/" in tests."""

    def __init__(
        self,
        root: str = "/",
        *,
        platform: str = sys.platform,
        commands: Mapping[tuple[str, ...], str] | None = None,
    ) -> None:
        self._root = Path(root)
        self.platform = platform
        self._commands = commands  # canned outputs; None: run the real commands

    @property
    def is_darwin(self) -> bool:
        return self.platform == "darwin"

    def read(self, path: str) -> str | None:
        """Return the text of a file, or None when it is absent or may not be read."""
        try:
            return self._at(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            # Which of these files exist differs between kernels, so absence is an answer.
            return None

    def device_number(self, path: str) -> str | None:
        """Return "major:minor" of a device node, or None when there is no such node."""
        try:
            number = os.stat(self._at(path)).st_rdev
        except OSError:
            return None
        return f"{os.major(number)}:{os.minor(number)}" if number else None

    def run(self, command: Sequence[str]) -> str | None:
        """Return what a command prints, or None when it is absent or hangs."""
        if self._commands is not None:
            return self._commands.get(tuple(command))
        try:
            # Not checked: sysctl fails for one unreadable value and prints all the others.
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            _log.debug("%s gave no answer: %s", " ".join(command), error)
            return None
        return done.stdout

    def sysctl(self) -> dict[str, str]:
        """Return name -> value of the sysctl values about hardware (macOS)."""
        texts = (self.run(["sysctl", branch]) or "" for branch in ("hw", "machdep.cpu"))
        return parse_sysctl("\n".join(texts))

    def _at(self, path: str) -> Path:
        return self._root / path.lstrip("/")


def parse_sysctl(text: str) -> dict[str, str]:
    """Return name -> value of "name: value" lines, as macOS prints them."""
    values = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            values[name.strip()] = value.strip()
    return values
