"""The order in which threads take processors: cores first, then their second threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.hardware.pinning import pin_order, pinned_cpus
from nexus_ext.hardware.system import System


def machine(
    root: Path, siblings: dict[int, str], fast: str = "", name: str = "core_cpus_list"
) -> System:
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(text + "\n")
    if fast:
        (root / "sys/devices/cpu_core").mkdir(parents=True)
        (root / "sys/devices/cpu_core/cpus").write_text(fast + "\n")
    return System(str(root), platform="linux")


def everything(siblings: dict[int, str]) -> frozenset[int]:
    return frozenset(siblings)


def test_one_of_each_core_before_its_sibling(tmp_path: Path) -> None:
    neighbours = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}  # as AMD and virtual machines number them
    assert pin_order(machine(tmp_path / "a", neighbours), everything(neighbours)) == (0, 2, 1, 3)
    apart = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}  # as Intel does
    assert pin_order(machine(tmp_path / "b", apart), everything(apart)) == (0, 1, 2, 3)


def test_only_what_the_process_may_use(tmp_path: Path) -> None:
    siblings = {cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(8)}
    system = machine(tmp_path, siblings)
    assert pin_order(system, frozenset({1, 4, 5, 7})) == (1, 4, 7, 5)
    assert pinned_cpus(3, system, frozenset({1, 4, 5, 7})) == (1, 4, 7)


def test_performance_cores_come_first(tmp_path: Path) -> None:
    siblings = {0: "0", 1: "1", 2: "2-3", 3: "2-3", 4: "4-5", 5: "4-5"}
    system = machine(tmp_path, siblings, fast="2-5")
    assert pin_order(system, everything(siblings)) == (2, 4, 0, 1, 3, 5)


def test_older_kernels_and_none_at_all(tmp_path: Path) -> None:
    siblings = {0: "0-1", 1: "0-1"}
    system = machine(tmp_path / "old", siblings, name="thread_siblings_list")
    assert pin_order(system, everything(siblings)) == (0, 1)
    assert pin_order(System(str(tmp_path / "none")), frozenset({3, 1})) == (1, 3)


def test_more_threads_than_processors_are_refused(tmp_path: Path) -> None:
    system = machine(tmp_path, {0: "0-1", 1: "0-1"})
    with pytest.raises(UsageError, match=r"3 threads cannot be pinned: .* may use 2 processors"):
        pinned_cpus(3, system, frozenset({0, 1}))
