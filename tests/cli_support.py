"""What the tests of the command line share: calling it here, as a process, or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from nexus_ext.cli import cli
from nexus_ext.testing import machine

COMMAND = [sys.executable, "-m", "nexus_ext.cli"]


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document as strict parsers read it."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def call(*arguments: str | Path, stdin: str | None = None) -> Done:
    """Run a command line in this process."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return Done(result.exit_code, result.stdout, result.stderr)


def run(*arguments: str | Path, stdin: str = "", environment: dict[str, str] | None = None) -> Done:
    """Run a command line as a process of its own, without a terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def on_terminal(*arguments: str | Path, typed: list[tuple[str, str]]) -> tuple[int, str]:
    """Run on a pseudo-terminal: wait for a text, type another, and so on.

    Returns the exit status and all that the terminal got. Ctrl-C is "\\x03", Ctrl-D "\\x04".
    """
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", NO_COLOR="1", COLUMNS="80", LINES="24")
        os.execv(COMMAND[0], [*COMMAND, *map(str, arguments)])
    out, seen, left = b"", 0, list(typed)
    while True:
        ready, _, _ = select.select([terminal], [], [], 60)
        try:
            piece = os.read(terminal, 1 << 16) if ready else b""
        except OSError:  # the child has closed the terminal
            piece = b""
        if not piece:
            break
        out += piece
        if left and (place := out.find(left[0][0].encode(), seen)) >= 0:
            seen = place + len(left[0][0].encode())
            os.write(terminal, left.pop(0)[1].encode())
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert not left, f"never saw {left[0][0]!r} in {out!r}"
    return os.waitstatus_to_exitcode(status), out.decode()


def hardware_file(directory: Path) -> Path:
    """Write the profile of a machine with two cores, no GPU and a disk of 1 GB/s."""
    file = directory / "hardware.json"
    file.write_text(machine().to_json(), encoding="utf-8")
    return file


def with_template(model: Path, template: str, target: Path) -> Path:
    """Copy a model, with a chat template added to its header."""
    from nexus_ext.formats.gguf_header import read_header

    header = read_header(str(model))
    key = b"tokenizer.chat_template"
    size = 8 + len(key) + 4 + 8 + len(template.encode())
    # Filled up to the alignment, so that what is behind it moves as a whole.
    filler = -size % header.alignment
    text = template.encode() + (b"{#" + b" " * (filler + header.alignment - 4) + b"#}")
    pair = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little")
    pair += len(text).to_bytes(8, "little") + text
    data = model.read_bytes()
    n_pairs = int.from_bytes(data[16:24], "little") + 1
    target.write_bytes(data[:16] + n_pairs.to_bytes(8, "little") + pair + data[24:])
    return target
