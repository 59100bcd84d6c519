"""Another llama.cpp program with the NEXUS backend in it: `nexus exec`.

The program knows nothing of nexus_ext. ggml loads the library that GGML_BACKEND_PATH names, the
library reads the plan from the file that NEXUS_MANIFEST names, and tells what became of it in the
file that NEXUS_REPORT names (native/backend/foreign.c has the lines). This module starts the
program, passes signals on, reads that report, and judges it: a program that quietly ran without the
backend has not done what the user asked for.

A program can open a GGUF only; of an NXF it is given a view (view.py).

What the program itself allocates (KV cache, compute buffers) is its own business; the plan counts
it from the arguments that llama.cpp's programs share, as far as they are given.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from nexus_ext import core
from nexus_ext.errors import UsageError
from nexus_ext.runtime import user_environ
from nexus_ext.runtime.manifest import manifest
from nexus_ext.runtime.planning import Planned
from nexus_ext.runtime.view import view_of, with_view

_log = logging.getLogger("nexus_ext.foreign")

PATH_VARIABLE: Final = "GGML_BACKEND_PATH"
MANIFEST_VARIABLE: Final = "NEXUS_MANIFEST"
REPORT_VARIABLE: Final = "NEXUS_REPORT"

# A terminal sends these to every process in front of it, the program included.
_FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
_FORWARDED: Final = (*_FROM_TERMINAL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S: Final = 0.5  # how soon a refusal is told while the program runs on

# Options of llama.cpp's programs that change how much memory they take.
_OPTIONS: Final = {
    "model": ("-m", "--model"),
    "n_ctx": ("-c", "--ctx-size"),
    "n_batch": ("-b", "--batch-size"),
    "n_ubatch": ("-ub", "--ubatch-size"),
}


@dataclass(frozen=True, slots=True)
class Accounting:
    """The counters of the backend, over the life of the program."""

    bytes_read: int
    bytes_used: int
    pieces: int
    pieces_ready: int
    wait_ns: int
    compute_ns: int
    passes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What the backend has told. Several processes may have written to it."""

    registered: tuple[str, ...] = ()  # versions of ggml
    refused: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    n_allocated: int = 0
    accounting: Accounting | None = None  # None: no process has ended normally yet

    @property
    def problem(self) -> str:
        """Why this was no run with paged weights, in words; "" when it was one."""
        if self.refused:
            return f"the backend refused: {self.refused[0]}"
        if not self.registered:
            return "the program never loaded the backend"
        if not self.n_allocated:
            return "the program loaded the backend, but never placed a weight on it"
        if self.failed:
            return f"reading weights failed: {self.failed[0]}"
        return ""

    @property
    def hint(self) -> str:
        """What can be done about `problem`."""
        if not self.registered and not self.refused:
            return (
                f"it must load the library in {PATH_VARIABLE}: llama.cpp built with "
                "GGML_BACKEND_DL does, other builds only when given an option such as --device or "
                "-ot; a program of your own calls ggml_backend_load_all()"
            )
        if not self.n_allocated and not self.refused:
            return "let it load the model that was planned for, with weights on the CPU (-ngl 0)"
        return "run `nexus doctor` with this model"


@dataclass(frozen=True, slots=True)
class ForeignRun:
    """A program that has ended."""

    exit_status: int  # as a shell reports it: 128 + n for signal n
    report: Report


def parse_report(text: str) -> Report:
    """Return what the lines of a report say. Lines that are cut off or not known are left out."""
    words: dict[str, list[str]] = {"registered": [], "refused": [], "failed": [], "allocated": []}
    counters: list[int] | None = None
    for line in text.splitlines():
        event, _, detail = line.partition(" ")
        if event in words:
            words[event].append(detail.strip())
        elif event == "stats":
            numbers = detail.split()
            if len(numbers) == len(Accounting.__slots__) and all(n.isdigit() for n in numbers):
                old = counters or [0] * len(numbers)
                counters = [a + int(b) for a, b in zip(old, numbers, strict=True)]
    return Report(
        registered=tuple(words["registered"]),
        refused=tuple(words["refused"]),
        failed=tuple(words["failed"]),
        n_allocated=len(words["allocated"]),
        accounting=None if counters is None else Accounting(*counters),
    )


def command_option(command: Sequence[str], name: str) -> str | None:
    """Return the value that a command line gives to an option of llama.cpp's; the last one wins."""
    found = None
    for i, word in enumerate(command):
        for option in _OPTIONS[name]:
            if word == option and i + 1 < len(command):
                found = command[i + 1]
            elif option.startswith("--") and word.startswith(option + "="):
                found = word[len(option) + 1 :]
    return found


def command_number(command: Sequence[str], name: str) -> int | None:
    """Return a numeric option of a command line, None when absent or not a plain number."""
    value = command_option(command, name)
    return int(value) if value is not None and value.isdigit() else None


def run_foreign(
    command: Sequence[str],
    planned: Planned,
    *,
    environ: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = _log.warning,
) -> ForeignRun:
    """Run `command` with the backend and the plan in its environment, to its end.

    Where the model is an NXF, arguments that name it name a view of it instead. `tell` gets a
    sentence at once when the backend refuses or a read fails: a server may run for days. Raises
    UsageError when the program cannot be started, when GGML_BACKEND_PATH is taken, or when no
    argument is the NXF.
    """
    environ = dict(os.environ if environ is None else environ)
    taken = environ.get(PATH_VARIABLE)
    if taken and taken != str(core.BACKEND_PATH):
        raise UsageError(
            f"{PATH_VARIABLE} already names {taken}, and ggml takes one library from it",
            hint=f"unset {PATH_VARIABLE}",
        )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nexus-exec-"))
        plan_file, report_file = Path(directory, "manifest"), Path(directory, "report")
        view = ""
        if planned.catalog.chunks is not None:
            path = stack.enter_context(view_of(planned.catalog))
            command, view = with_view(command, planned.catalog.files[0].path, path), str(path)
        plan_file.write_text(
            manifest(planned.catalog, planned.plan, planned.io_mode, view=view),
            encoding="utf-8",
            errors="surrogateescape",
        )
        environ |= {
            PATH_VARIABLE: str(core.BACKEND_PATH),
            MANIFEST_VARIABLE: str(plan_file),
            REPORT_VARIABLE: str(report_file),
        }
        status = _run(command, environ, report_file, tell)
        return ForeignRun(status, _read(report_file))


def run_plain(command: Sequence[str]) -> int:
    """Run `command` as it is; return its exit status as a shell would."""
    return _run(command, user_environ(), None, _log.warning)


def _run(
    command: Sequence[str],
    environ: Mapping[str, str],
    report_file: Path | None,
    tell: Callable[[str], None],
) -> int:
    told = 0
    with _forwarding() as forward_to:
        try:
            child = subprocess.Popen(list(command), env=environ)
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            raise UsageError(
                f"{command[0]!r} cannot be started: {error.strerror}",
                hint="install it, or give its path: nothing of this name is in PATH"
                if absent and os.sep not in command[0]
                else "give the program and its arguments behind `--`",
            ) from error
        forward_to(child)
        while True:
            try:
                status = child.wait(None if report_file is None else _POLL_S)
                break
            except subprocess.TimeoutExpired:
                assert report_file is not None
                report = _read(report_file)
                bad = [*report.refused, *report.failed]
                for text in bad[told:]:
                    tell(f"the backend inside {command[0]} reports: {text}")
                told = len(bad)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _forwarding() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Within the block, signals to this process go instead to the program that is named to it.

    What comes before that is kept for the program: the signal that ends this process as soon as
    the program has started would leave the program behind, with nobody to end it.
    """
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if number in _FROM_TERMINAL and os.isatty(0):
            return
        if not children:
            early.append(number)
        elif children[0].poll() is None:
            children[0].send_signal(number)

    def name(child: subprocess.Popen[bytes]) -> None:
        children.append(child)
        while early:
            child.send_signal(early.pop(0))

    # What is ignored here (nohup) the program ignores too, and inherits that.
    before = {
        number: signal.signal(number, forward)
        for number in _FORWARDED
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(report_file: Path) -> Report:
    try:
        return parse_report(report_file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return Report()  # nobody has had anything to say
