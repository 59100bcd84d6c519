"""Commands run under a memory limit, and nothing of it is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.hardware.system import System
from nexus_ext.runtime import memory_limit
from nexus_ext.runtime.memory_limit import memory_group, run_limited
from nexus_ext.units import MIB

LIMIT = 128 * MIB


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The directories of all groups that are made; they must be gone at the end."""
    try:
        with memory_group(LIMIT):
            pass
    except UsageError as error:
        pytest.skip(str(error))
    made: list[str] = []
    create = memory_limit._make

    def recording(*arguments: object) -> object:
        directory = create(*arguments)  # type: ignore[arg-type]
        if directory is not None:
            made.append(directory.path)
        return directory

    monkeypatch.setattr(memory_limit, "_make", recording)
    yield made
    assert not [path for path in made if os.path.exists(path)]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_within_the_limit_reports_its_peak(groups: list[str]) -> None:
    run = run_limited(python("x = bytearray(50 << 20)"), LIMIT)
    assert run.exit_status == 0
    assert run.usage.oom_kills in (0, None)
    assert run.usage.peak_bytes is None or 50 * MIB < run.usage.peak_bytes <= LIMIT


def test_a_command_beyond_the_limit_is_killed(groups: list[str]) -> None:
    run = run_limited(python("x = bytearray(1 << 30)"), LIMIT)
    assert run.exit_status != 0
    assert run.usage.oom_kills in (1, None)


def test_the_exit_status_comes_back(groups: list[str]) -> None:
    assert run_limited(["/bin/sh", "-c", "exit 7"], LIMIT).exit_status == 7


def test_what_still_runs_ends_with_the_group(groups: list[str]) -> None:
    with memory_group(LIMIT) as group:
        child = subprocess.Popen(
            group.command(["/bin/sh", "-c", "echo up; exec sleep 600"]), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        with child.stdout as out:
            assert out.readline() == b"up\n"
    assert child.wait(60) != 0


def test_the_group_goes_when_the_block_fails(groups: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), memory_group(LIMIT):
        raise ZeroDivisionError


def test_a_limit_too_small_to_start_in_is_refused() -> None:
    with pytest.raises(UsageError, match="is below"):
        run_limited(["true"], 1000)


def test_a_machine_without_any_way_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UsageError, match="no memory cgroup on this system; there is no systemd-run"
    ):
        with memory_group(LIMIT, System(str(tmp_path))):
            pytest.fail("there is nothing to limit with")


def test_a_limit_above_the_one_in_force_is_refused(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/self/mountinfo").write_text(
        "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    (group / "memory.max").write_text(f"{64 * MIB}\n")
    with pytest.raises(UsageError, match=r"more than the 64\.0 MiB"):
        with memory_group(LIMIT, System(str(tmp_path))):
            pytest.fail("the limit in force is tighter")
