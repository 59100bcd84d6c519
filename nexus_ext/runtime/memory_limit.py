"""Run a command in a memory cgroup of its own: a limit that the kernel enforces, and a peak.

Version 1 and 2, wherever this user may create a group; else `systemd-run --scope`, which may do it
for users. What counts against the limit is what the kernel counts: anonymous memory and the page
cache that the command causes. Swap is not allowed, or a limit would not be one.

Knows nothing of models. Sources: cgroups(7); kernel documentation, admin-guide/cgroup-v1/memory
and admin-guide/cgroup-v2; systemd.resource-control(5).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nexus_ext.errors import UsageError
from nexus_ext.hardware.cgroup import group_directories, memory_groups, parse_cgroup
from nexus_ext.hardware.mounts import read_mounts
from nexus_ext.hardware.system import System
from nexus_ext.units import MIB, format_bytes

_log = logging.getLogger("nexus_ext.memory_limit")

SMALLEST_LIMIT_BYTES = 4 * MIB  # below this not even a shell starts
_REMOVE_ATTEMPTS = 50
_ENTER = 'echo $$ > "$0" && exec "$@"'  # the shell enters the group, then becomes the command


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group has seen. None: this system does not tell."""

    peak_bytes: int | None
    oom_kills: int | None


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """A command that has ended."""

    exit_status: int  # negative: the signal that ended it
    usage: Usage
    limit_bytes: int
    how: str


class MemoryGroup(ABC):
    """A place where commands run under a limit. Made by `memory_group`."""

    def __init__(self, limit_bytes: int, how: str) -> None:
        self.limit_bytes = limit_bytes
        self.how = how  # what enforces the limit, in words

    @abstractmethod
    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in the group, in the same process."""

    def usage(self) -> Usage:
        """Return the peak and the kills so far."""
        return Usage(None, None)


@dataclass(frozen=True, slots=True)
class _Files:
    """The control files of one version of cgroups."""

    version: int
    limits: tuple[tuple[str, str], ...]  # (file, "{}" or a constant); the first must exist
    peak: str
    events: str  # has a line "oom_kill N"


_V1 = _Files(
    1,
    # The second counts swap too; it cannot be below the first, so it comes after it.
    (("memory.limit_in_bytes", "{}"), ("memory.memsw.limit_in_bytes", "{}")),
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)
_V2 = _Files(
    2, (("memory.max", "{}"), ("memory.swap.max", "0")), "memory.peak", "memory.events"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Directory:
    """A group that was created, as files."""

    path: str
    files: _Files

    def set_limit(self, limit_bytes: int) -> None:
        for number, (name, value) in enumerate(self.files.limits):
            file = os.path.join(self.path, name)
            if number == 0 or os.path.exists(file):
                _write(file, value.format(limit_bytes))

    def usage(self) -> Usage:
        kills = None
        for line in (self._read(self.files.events) or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                kills = int(value)
        peak = (self._read(self.files.peak) or "").strip()
        return Usage(int(peak) if peak.isdigit() else None, kills)

    def remove(self) -> None:
        """End what still runs in the group, and remove it."""
        reason = None
        for _ in range(_REMOVE_ATTEMPTS):
            for pid in (self._read("cgroup.procs") or "").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                os.rmdir(self.path)
                return
            except FileNotFoundError:
                return
            except OSError as error:  # busy: a process that was killed is still on its way out
                reason = error.strerror
            time.sleep(0.02)
        _log.warning("the memory group %s cannot be removed: %s", self.path, reason)

    def _read(self, name: str) -> str | None:
        try:
            with open(os.path.join(self.path, name), encoding="ascii") as file:
                return file.read()
        except OSError:
            return None  # older kernels lack some of these files


class _CgroupGroup(MemoryGroup):
    def __init__(self, directory: _Directory, limit_bytes: int) -> None:
        super().__init__(
            limit_bytes, f"cgroup v{directory.files.version}, {format_bytes(limit_bytes)}"
        )
        self._directory = directory

    def command(self, command: Sequence[str]) -> list[str]:
        procs = os.path.join(self._directory.path, "cgroup.procs")
        return ["/bin/sh", "-c", _ENTER, procs, *command]

    def usage(self) -> Usage:
        return self._directory.usage()


class _SystemdGroup(MemoryGroup):
    def __init__(self, program: str, limit_bytes: int) -> None:
        super().__init__(limit_bytes, f"systemd-run, {format_bytes(limit_bytes)}")
        self._program = program

    def command(self, command: Sequence[str]) -> list[str]:
        who = [] if os.geteuid() == 0 else ["--user"]
        limits = ["-p", f"MemoryMax={self.limit_bytes}", "-p", "MemorySwapMax=0"]
        return [self._program, *who, "--scope", "--quiet", "--collect", *limits, "--", *command]


@contextlib.contextmanager
def memory_group(limit_bytes: int, system: System | None = None) -> Iterator[MemoryGroup]:
    """Return a group of `limit_bytes`; it is gone when the block ends, with all that runs in it.

    Raises UsageError when this user may not limit memory, or when a tighter limit is in force.
    """
    system = system or System()
    if limit_bytes < SMALLEST_LIMIT_BYTES:
        raise UsageError(
            f"a memory limit of {limit_bytes} bytes is below {SMALLEST_LIMIT_BYTES}, which a "
            "process needs to start",
            hint="give a larger limit",
        )
    tightest = min((g.limit_bytes for g in memory_groups(system)), default=None)
    if tightest is not None and limit_bytes > tightest:
        raise UsageError(
            f"a memory limit of {format_bytes(limit_bytes)} is more than the "
            f"{format_bytes(tightest)} that this process is limited to",
            hint=f"give at most {tightest}",
        )
    refusals: list[str] = []
    directory = _create(system, refusals)
    if directory is None:
        program = _usable_systemd_run(system, refusals)
        if program is None:
            raise UsageError(
                f"this user may not limit memory: {'; '.join(refusals)}",
                hint="run as root, or where a memory cgroup is delegated to this user",
            )
        yield _SystemdGroup(program, limit_bytes)
        return
    try:
        directory.set_limit(limit_bytes)
        yield _CgroupGroup(directory, limit_bytes)
    finally:
        directory.remove()


def run_limited(command: Sequence[str], limit_bytes: int) -> LimitedRun:
    """Run `command` to its end under a limit. Raises UsageError when memory cannot be limited."""
    with memory_group(limit_bytes) as group:
        done = subprocess.run(group.command(command), check=False)
        return LimitedRun(done.returncode, group.usage(), limit_bytes, group.how)


def _create(system: System, refusals: list[str]) -> _Directory | None:
    """Create a group below the own one, or beside it where version 2 wants that."""
    paths = parse_cgroup(system.read("/proc/self/cgroup") or "")
    v1, v2 = group_directories("memory", paths, read_mounts(system))
    if v1 and (made := _make(v1[0], _V1, refusals)):
        return made
    for parent in v2:
        if _delegates_memory(parent, refusals) and (made := _make(parent, _V2, refusals)):
            return made
        # A group beside this one must not escape from a limit that this one has.
        if (system.read(f"{parent}/memory.max") or "max").strip() != "max":
            break
    if not v1 and not v2:
        refusals.append("there is no memory cgroup on this system")
    return None


def _delegates_memory(parent: str, refusals: list[str]) -> bool:
    """Whether groups below `parent` get memory controls; switches them on where that is allowed.

    The kernel refuses for a group with processes in it, which the own group usually is.
    """
    control = os.path.join(parent, "cgroup.subtree_control")
    try:
        with open(control, encoding="ascii") as file:
            if "memory" in file.read().split():
                return True
        _write(control, "+memory")
    except OSError as error:
        refusals.append(f"{control}: {error.strerror}")
        return False
    return True


def _make(parent: str, files: _Files, refusals: list[str]) -> _Directory | None:
    path = ""
    try:
        path = tempfile.mkdtemp(prefix=f"nexus-{os.getpid()}-", dir=parent)
        directory = _Directory(path, files)
        _write(os.path.join(path, files.limits[0][0]), str(1 << 40))  # may it be limited at all?
        _can_enter(directory)
    except OSError as error:
        refusals.append(f"{parent}: {error.strerror or error}")
        if path:
            _Directory(path, files).remove()
        return None
    return directory


def _can_enter(directory: _Directory) -> None:
    """Raise OSError when processes of this user may not be moved into the group."""
    procs = os.path.join(directory.path, "cgroup.procs")
    done = subprocess.run(
        ["/bin/sh", "-c", _ENTER, procs, "/bin/sh", "-c", ":"], capture_output=True, check=False
    )
    if done.returncode != 0:
        raise OSError(f"no process may enter it ({done.stderr.decode(errors='replace').strip()})")


def _usable_systemd_run(system: System, refusals: list[str]) -> str | None:
    program = shutil.which("systemd-run")
    if program is None:
        refusals.append("there is no systemd-run")
        return None
    trial = _SystemdGroup(program, 1 << 30).command(["true"])
    # Asked rather than assumed: the program is often there without a systemd that it could ask.
    done = subprocess.run(trial, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        refusals.append(f"systemd-run: {text[-1] if text else 'fails'}")
        return None
    return program


def _write(file: str, text: str) -> None:
    with open(file, "w", encoding="ascii") as stream:
        stream.write(text)
