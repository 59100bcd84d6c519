"""`nexus exec`: a program that knows nothing of nexus_ext streams, or the failure is loud."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexus_ext import runtime
from nexus_ext.runtime import foreign
from nexus_ext.runtime.foreign import (
    Accounting,
    Report,
    command_number,
    command_option,
    parse_report,
)
from tests.models_folder import find_model

PROGRAM = [sys.executable, str(Path(__file__).with_name("foreign_program.py"))]
NEXUS = [sys.executable, "-m", "nexus_ext.cli", "exec", "--weights", "1M", "-c", "128"]


@pytest.fixture
def model() -> str:
    return str(find_model("bitllama-3M-q4_k_m.gguf"))


@pytest.fixture(autouse=True)
def _threads_that_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # tests share the machine


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_program_streams_and_its_tokens_are_the_same(model: str) -> None:
    alone = run(*PROGRAM, model, "12", "ignore")
    assert alone.returncode == 0, alone.stderr
    paged = run(*NEXUS, "--model", model, "--", *PROGRAM, model, "12", "load")
    assert paged.returncode == 0, paged.stderr
    assert paged.stdout == alone.stdout
    assert "passes" in paged.stderr.splitlines()[-1]


def test_the_accounting_shows_that_weights_were_read(model: str) -> None:
    done = run(*NEXUS, "--json", "--model", model, "--", *PROGRAM, model, "4", "load")
    assert done.returncode == 0, done.stderr
    _, _, document = done.stdout.partition("\n")
    accounting = json.loads(document)["report"]["accounting"]
    assert accounting["passes"] >= 4
    assert accounting["bytes_used"] > 1 << 20


def test_a_program_that_never_loads_the_backend_fails_loudly(model: str) -> None:
    done = run(*NEXUS, "--model", model, "--", *PROGRAM, model, "2", "ignore")
    assert done.returncode == 1
    assert "never loaded the backend" in done.stderr
    assert "GGML_BACKEND_PATH" in done.stderr


def test_a_program_that_loads_another_model_fails_loudly(model: str) -> None:
    other = str(find_model("stories260K-f32.gguf"))
    done = run(*NEXUS, "--model", model, "--", *PROGRAM, other, "2", "load")
    assert done.returncode == 1
    assert "never placed a weight" in done.stderr


def test_a_plan_for_other_bytes_of_the_same_shape_is_refused(model: str, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copyfile(model, other)
    with open(other, "r+b") as file:  # all weights: half of the file is behind the vocabulary
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(size // 4)
        file.write(bytes(size - size // 4))
    done = run(*NEXUS, "--model", model, "--", *PROGRAM, str(other), "2", "load")
    assert done.returncode != 0
    assert "the plan is for another file" in done.stderr


def test_the_status_of_the_program_comes_back(model: str) -> None:
    done = run(*NEXUS, "--model", model, "--", "/bin/sh", "-c", "exit 7")
    assert done.returncode == 7
    assert "ended with status 7" in done.stderr
    assert run(*NEXUS, "--model", model, "--", "/bin/sh", "-c", "kill -9 $$").returncode == 137


def test_signals_go_to_the_program(model: str) -> None:
    # Ends by itself one day: a program that gets no signal must not outlive the tests.
    script = "trap 'echo got it; exit 9' TERM; echo ready; for i in $(seq 600); do sleep 0.1; done"
    command = [*NEXUS, "--model", model, "--", "/bin/sh", "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"ready\n"
            child.send_signal(signal.SIGTERM)
            assert child.stdout.readline() == b"got it\n"
            assert child.wait() == 9
        finally:
            child.kill()


def test_a_signal_while_the_program_starts_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        child = start(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    monkeypatch.setattr(foreign.subprocess, "Popen", interrupted)
    assert foreign.run_plain(["sleep", "60"]) == 128 + signal.SIGTERM


def test_signals_that_are_ignored_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert foreign.run_plain(["/bin/sh", "-c", "kill -HUP $$; exit 7"]) == 7
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_that_runs_as_it_is_gets_the_environment_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_chosen_here", True)
    monkeypatch.setenv("GOMP_SPINCOUNT", str(runtime.SPIN_COUNT))
    assert foreign.run_plain(["/bin/sh", "-c", 'test -z "$GOMP_SPINCOUNT"']) == 0
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert foreign.run_plain(["/bin/sh", "-c", 'test "$GOMP_SPINCOUNT" = 7']) == 0


def test_a_program_that_does_not_exist_is_wrong_usage(model: str) -> None:
    done = run(*NEXUS, "--model", model, "--", "no-such-program")
    assert done.returncode == 2
    assert "'no-such-program' cannot be started" in done.stderr and "PATH" in done.stderr


def test_without_a_model_the_question_is_asked() -> None:
    done = run(*NEXUS, "--", "program", "--verbose")
    assert done.returncode == 2
    assert "--model FILE" in done.stderr


def test_a_backend_path_of_somebody_else_is_not_replaced(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_BACKEND_PATH", "/other.so")
    done = run(*NEXUS, "--model", model, "--", "true")
    assert done.returncode == 2
    assert "already names /other.so" in done.stderr


def test_a_program_whose_model_fits_runs_as_it_is(model: str) -> None:
    done = run(
        *(sys.executable, "-m", "nexus_ext.cli", "exec", "-c", "128", "--", "/bin/sh", "-c"),
        'test -z "$GGML_BACKEND_PATH" && echo untouched',
        *("sh", "-m", model),
    )
    assert (done.returncode, done.stdout) == (0, "untouched\n")


def test_options_of_the_command_are_found() -> None:
    command = ["llama-server", "-m", "a", "--model=b", "-c", "8192", "-ub", "x", "--ctx-size"]
    assert command_option(command, "model") == "b"
    assert command_number(command, "n_ctx") == 8192
    assert command_number(command, "n_ubatch") is None
    assert command_option(command, "n_batch") is None


def test_reports_of_several_processes_add_up() -> None:
    stats = "stats 10 9 8 7 6 5 4\n"
    report = parse_report(f"registered 0.25.3\nallocated \n{stats}{stats}freed \nstats 1 2\nsta")
    assert report.accounting == Accounting(20, 18, 16, 14, 12, 10, 8)
    assert (report.registered, report.n_allocated, report.problem) == (("0.25.3",), 1, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "never loaded"),
        ("refused this ggml is too old\n", "too old"),
        ("registered 1\n", "never placed a weight"),
        ("registered 1\nallocated \nfailed short read\n", "short read"),
        ("registered 1\nallocated \nrefused another file\n", "another file"),
    ],
)
def test_every_way_of_not_streaming_is_a_problem_with_a_hint(text: str, problem: str) -> None:
    report: Report = parse_report(text)
    assert problem in report.problem
    assert report.hint
