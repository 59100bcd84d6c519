"""`nexus bench` measures both sides and counts what was read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from nexus_ext import runtime
from nexus_ext.runtime.bench import worker_environ
from tests.models_folder import find_model


@pytest.fixture(autouse=True)
def _threads_that_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # tests share the machine


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    model = str(find_model("tinydense-7M-Q4_K_M.gguf"))
    command = [sys.executable, "-m", "nexus_ext.cli", "bench", model, *arguments]
    lengths = ("-p", "8", "-n", "4", "--repeat", "1")
    return subprocess.run([*command, *lengths], capture_output=True, text=True, check=False)


def test_both_sides_are_measured_and_choose_the_same_tokens() -> None:
    done = bench("--weights", "3M", "--io", "direct", "--baseline", "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    paged, stock = result["runs"]
    assert (paged["side"], stock["side"]) == ("paged", "stock")
    assert paged["chosen"] == stock["chosen"]
    assert len(paged["token_s"]) == 4
    assert paged["decode"]["engine_read_bytes"] > 0
    assert stock["decode"]["engine_read_bytes"] is None
    assert result["decode_ratio"] > 0
    assert len(result["disk"]) == 1  # before loading
    # in the pauses before, between and behind four parts of a token each; or once behind them
    assert len(paged["disk"]) == (5 if result["disk"][0]["direct"] else 1)
    assert len(paged["chosen"]) == 1 + 1 + 4 + 4  # prompt, warm-up, one behind each pause, measured
    assert stock["disk"] == []


def test_a_model_that_fits_has_no_bound_and_people_can_read_it() -> None:
    done = bench("--warm")
    assert done.returncode == 0, done.stderr
    assert "decode tok/s" in done.stdout
    assert "none: decoding read nothing from the disk" in done.stdout
    assert "Everything fits" in done.stderr


def test_runs_longer_than_the_context_are_refused() -> None:
    done = bench("--ctx", "8", "--weights", "3M")
    assert done.returncode == 2
    assert "more than the context of 8" in done.stderr


def test_stock_llama_cpp_waits_as_it_does_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(runtime, "_chosen_here", True)
    monkeypatch.setenv("GOMP_SPINCOUNT", str(runtime.SPIN_COUNT))
    assert worker_environ("paged") is None
    environ = worker_environ("stock")
    assert environ is not None and environ["GOMP_SPINCOUNT"] == "300000"


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_said_of_waiting_holds_for_both_sides(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "_chosen_here", False)
    monkeypatch.setenv(variable, "PASSIVE" if variable == "OMP_WAIT_POLICY" else "1000")
    environ = worker_environ("stock")
    assert environ is not None and environ == dict(os.environ)
