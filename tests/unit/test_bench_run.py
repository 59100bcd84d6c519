"""`nexus bench` measures both sides and counts what was read."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

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
    assert len(result["disk"]) == 2  # before and after


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
