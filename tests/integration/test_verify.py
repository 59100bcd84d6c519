"""`nexus verify` says identical when it is, and finds one changed weight when it is not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ext import Llama
from nexus_ext.errors import UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime import verify
from nexus_ext.runtime.quantize import planned_types, quantize
from nexus_ext.runtime.verify import Verification, plan_to_verify, verify_model
from nexus_ext.runtime.worker import Job, run_worker
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe
from tests.cli_support import COMMAND, hardware_file
from tests.models_folder import find_model

REQUEST = PlanRequest(n_ctx=128, n_batch=32, n_ubatch=16, n_threads=2, gpu_bytes=0)


@pytest.fixture(autouse=True)
def _threads_that_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # tests share the machine


def check(path: Path, request: PlanRequest = REQUEST, **arguments: Any) -> Verification:
    planned = plan_to_verify(str(path), request)
    return verify_model(str(path), planned, request, **{"n_prompt": 20, "n_decode": 4, **arguments})


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_dense_model_is_identical(flash_attn: bool) -> None:
    path = find_model("bitllama-3M-q4_k_m.gguf")
    result = check(path, replace(REQUEST, flash_attn=flash_attn))
    assert result.identical
    assert result.same_choices
    assert result.comparison.n_positions == 24
    assert 0 < result.streamed_nbytes < open_gguf(str(path)).nbytes
    assert result.streamed_read_bytes > 0


def test_a_mixture_of_experts_is_identical(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    write_moe(path, arch="qwen3moe", dims=MoeDims())
    assert check(path, prompt="once upon a time").identical


def test_one_changed_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_model("stories260K-f32.gguf")
    changed = tmp_path / "changed.gguf"
    shutil.copyfile(path, changed)
    tensor = next(t for t in open_gguf(str(path)).tensors if t.name == "blk.2.ffn_down.weight")
    with open(changed, "r+b") as file:
        file.seek(tensor.offset)
        first = file.read(4)
        file.seek(tensor.offset)
        file.write(bytes([first[0] ^ 1, *first[1:3], first[3] ^ 0x80]))  # its sign

    def streams_the_changed_one(job: Job) -> dict[str, Any]:
        return run_worker(replace(job, model=str(changed)) if job.side == "paged" else job)

    monkeypatch.setattr(verify, "run_worker", streams_the_changed_one)
    result = check(path)
    assert not result.identical
    first_difference = result.comparison.first
    assert first_difference is not None
    assert (first_difference.phase, first_difference.position) == ("prompt", 0)
    assert first_difference.max_abs_diff > 0


def test_a_budget_that_streams_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nothing of .* is streamed"):
        plan_to_verify(
            str(find_model("bitllama-3M-q4_k_m.gguf")), replace(REQUEST, ram_bytes=2 << 30)
        )


def test_more_tokens_than_the_context_holds_are_refused() -> None:
    with pytest.raises(UsageError, match="more than the context of 128"):
        check(find_model("bitllama-3M-q4_k_m.gguf"), n_prompt=127)


def test_the_command_says_identical_and_leaves_with_zero() -> None:
    path = find_model("bitllama-3M-q4_k_m.gguf")
    command = ["verify", str(path), "--ctx", "128", "--prompt", "Once", "-n", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nexus_ext.cli", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["identical"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_leaves_no_worker_and_no_file(tmp_path: Path, number: int) -> None:
    scratch, hardware = tmp_path / "scratch", hardware_file(tmp_path)
    scratch.mkdir()
    command = [*COMMAND, "verify", str(find_model("bitllama-3M-q4_k_m.gguf")), "-n", "900"]
    options = ["-c", "1024", "--hardware", str(hardware), "--scratch", str(scratch)]
    with subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # also under nohup
    ) as child:
        workers: list[int] = []
        while not list(scratch.glob("*/*")):  # the worker has begun to write logits
            assert child.poll() is None
        for task in Path(f"/proc/{child.pid}/task").iterdir():
            workers += map(int, (task / "children").read_text().split())
        child.send_signal(number)
    assert child.returncode == -number and workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(scratch.iterdir()) == []


def test_any_part_of_a_split_model_names_it(tmp_path: Path) -> None:
    """Paged, and by llama.cpp alone, which opens a model by its first part only."""
    parts = write_llama(
        tmp_path / "m.gguf", n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2,
        n_vocab=512, quant="F16", split=3,
    )  # fmt: skip
    request = replace(REQUEST, weights_bytes=open_gguf(parts[0]).nbytes * 3 // 4)
    assert check(parts[1], request).identical
    whole = Llama(parts[2], ram="2G", n_ctx=64, verbose=False)
    assert not whole.nexus.active and whole.n_ctx() >= 64
    whole.close()
    made = quantize(parts[1], tmp_path / "q8.gguf", "q8_0")
    assert set(made.tensor_types.values()) == {"Q8_0", "F32"}
    assert planned_types(parts[2], "q8_0").keys() < made.tensor_types.keys()


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{place}': No"):
        check(find_model("stories260K-q4_0.gguf"), scratch_dir=str(tmp_path / place))
