"""`nexus doctor` looks at everything, explains what it finds, and survives what it looks at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ext.hardware.system import System
from nexus_ext.runtime import doctor
from nexus_ext.runtime.doctor import CHECKS, MODEL_CHECKS, Check, Subject, run_checks
from tests.models_folder import find_model


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Subject]:
    """A machine whose files say what a test wants them to."""

    def of(**files: str) -> Subject:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Subject(system=System(str(tmp_path)), busy_window_s=0.0)

    return of


def test_every_check_of_this_machine_can_be_made() -> None:
    path = str(find_model("bitllama-3M-q4_k_m.gguf"))
    checks = run_checks(Subject(path, busy_window_s=0.0))
    assert len(checks) == len(CHECKS) + len(MODEL_CHECKS)
    assert not [check for check in checks if check.status == "fail"]
    assert all(check.sentence for check in checks)
    assert all(check.fix for check in checks if check.status == "warn")


def test_the_command_reports_in_json_and_leaves_with_zero() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexus_ext.cli", "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert {"backend", "io_uring", "AMX"} <= {check["name"] for check in document["checks"]}


def test_a_model_that_is_none_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF is how it begins, and that is all")
    done = subprocess.run(
        [sys.executable, "-m", "nexus_ext.cli", "doctor", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "fail  model" in done.stdout


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken(subject: Subject) -> Check:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, doctor.check_flash_attention))
    broken, other = run_checks(Subject())
    assert (broken.name, broken.status, other.status) == ("broken", "fail", "ok")
    assert "ZeroDivisionError: oh" in broken.sentence


def test_swap_and_huge_pages_are_warned_of(machine: Callable[..., Subject]) -> None:
    subject = machine(
        proc__swaps="Filename Type Size Used Priority\n/dev/sda2 partition 8388604 0 -2\n",
        sys__kernel__mm__transparent_hugepage__enabled="[always] madvise never\n",
    )
    assert doctor.check_swap(subject).status == "warn"
    assert doctor.check_huge_pages(subject).status == "warn"


def test_a_quiet_machine_is_not_warned_of(machine: Callable[..., Subject]) -> None:
    subject = machine(proc__stat="cpu  1 2 3 4 5 6 7 8 9 10\n", proc__swaps="Filename Type\n")
    assert doctor.check_busy(subject).status == "ok"
    assert doctor.check_swap(subject).status == "ok"


def test_other_programs_are_seen(
    machine: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(([100, 0, 0, 900, 0, 0, 0, 0], [160, 0, 0, 930, 10, 0, 0, 0]))
    monkeypatch.setattr(doctor, "_cpu_times", lambda system: next(times))
    found = doctor.check_busy(machine())
    assert (found.status, "60%" in found.sentence) == ("warn", True)


def test_spinning_threads_are_warned_of_until_they_are_told_not_to(
    machine: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = machine(proc__self__maps="7f00-7f01 r-xp 0 0:0 1 /lib/libgomp.so.1\n")
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    assert doctor.check_openmp(subject).status == "warn"
    for few in ("0", "1000", " 1K"):
        monkeypatch.setenv("GOMP_SPINCOUNT", few)
        assert doctor.check_openmp(subject).status == "ok"
    for many in ("1001", "300k", "infinite"):
        monkeypatch.setenv("GOMP_SPINCOUNT", many)
        assert doctor.check_openmp(subject).status == "warn"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert doctor.check_openmp(subject).status == "ok"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert doctor.check_openmp(subject).status == "warn"


def test_a_second_ggml_is_seen(machine: Callable[..., Subject]) -> None:
    lines = "".join(f"7f0{i}-7f0{i + 1} r-xp 0 0:0 1 /lib{i}/libggml-base.so.0\n" for i in (1, 2))
    found = doctor.check_one_ggml(machine(proc__self__maps=lines))
    assert found.status == "warn"
    assert "/lib1/libggml-base.so.0, /lib2/libggml-base.so.0" in found.sentence


def test_weights_in_amx_buffers_that_crash_are_warned_of(
    machine: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "amx_works", lambda: False)
    assert doctor.check_amx(machine()).status == "warn"
    monkeypatch.setattr(doctor, "amx_works", lambda: None)
    assert doctor.check_amx(machine()).status == "ok"


def test_the_kernels_that_run_are_named(
    machine: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.check_kernels(machine())
    assert found.status == ("warn" if doctor.kernels.current_isa() == "reference" else "ok")
    assert found.sentence.startswith(doctor.kernels.why()) and "pencl" in found.sentence.lower()
    monkeypatch.setattr(doctor.kernels, "current_isa", lambda: "reference")
    assert doctor.check_kernels(machine()).status == "warn"


def test_a_model_in_memory_is_warned_of(machine: Callable[..., Subject], tmp_path: Path) -> None:
    subject = machine(proc__self__mountinfo=f"30 20 0:26 / {tmp_path} rw - tmpfs tmpfs rw\n")
    model = Subject(str(tmp_path / "model.gguf"), subject.system)
    assert doctor.check_file_system(model).status == "warn"
