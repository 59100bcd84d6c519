"""What happens to a paged model when reads, files, memory or the user fail it."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import DoesNotFit, ModelChanged, ModelClosed, NexusError, ReadFailed
from tests.integration.streaming import SMALL, logits, paged, prompt, stock
from tests.models_folder import find_model

NAME = "bitllama-3M-q4_k_m.gguf"


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with stock(find_model(NAME)) as llm:
        return logits(llm, prompt(40, llm.n_vocab()))


@pytest.mark.parametrize("kind", ["eio", "short"])
def test_a_read_that_fails_for_a_moment_changes_nothing(kind: str, expected: np.ndarray) -> None:
    with paged(find_model(NAME), "700K") as llm:
        model = llm.nexus.model
        assert model is not None
        model.inject(kind, count=3)
        assert np.array_equal(logits(llm, prompt(40, llm.n_vocab())), expected)
        stats = model.stats()
        assert (stats.retries if kind == "eio" else stats.short_reads) >= 3


def test_a_read_that_fails_for_good_is_named_and_the_next_call_works(expected: np.ndarray) -> None:
    path = find_model(NAME)
    with paged(path, "700K") as llm:
        model = llm.nexus.model
        assert model is not None
        tokens = prompt(40, llm.n_vocab())
        logits(llm, tokens)
        model.inject("eio")
        with pytest.raises(ReadFailed) as failure:
            logits(llm, tokens)
        assert failure.value.path == str(path)
        assert failure.value.errno == 5
        assert 0 < failure.value.offset < path.stat().st_size
        model.clear_faults()
        assert np.array_equal(logits(llm, tokens), expected)


def test_progress_counts_the_bytes_of_resident_weights() -> None:
    path = find_model(NAME)
    seen = []

    def progress(done: int, total: int) -> bool:
        seen.append((done, total))
        return False

    with paged(path, "1500K", progress=progress) as llm:
        assert llm.nexus.active
    assert seen and seen[-1][0] <= seen[-1][1]


def test_a_load_that_is_stopped_gives_everything_back() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(NexusError, match="stop"):
            Llama(
                find_model(NAME),
                weights="1500K",
                policy="direct",
                progress=lambda *_: True,
                **SMALL,
            )
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_an_exception_of_the_progress_callback_reaches_the_caller() -> None:
    def progress(done: int, total: int) -> bool:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        Llama(find_model(NAME), weights="1500K", policy="direct", progress=progress, **SMALL)


def test_a_file_that_is_truncated_under_us_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(find_model(NAME), path)
    with paged(path, "700K") as llm:
        tokens = prompt(20, llm.n_vocab())
        logits(llm, tokens)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ModelChanged, match=r"model\.gguf"):
            logits(llm, tokens)


def test_a_file_that_is_overwritten_under_us_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(find_model(NAME), path)
    with paged(path, "700K") as llm:
        tokens = prompt(20, llm.n_vocab())
        logits(llm, tokens)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\0" * 4096)
        os.utime(path, ns=(1, 1))  # whatever the granularity of the file system's clock
        with pytest.raises(ModelChanged, match=r"model\.gguf"):
            logits(llm, tokens)


@pytest.mark.parametrize("engine", ["threads", "uring"])
def test_every_engine_gives_the_same_bits(
    engine: str, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_IO_ENGINE", engine)
    for policy in ("direct", "buffered"):
        with paged(find_model(NAME), "700K", policy=policy) as llm:
            assert np.array_equal(logits(llm, prompt(40, llm.n_vocab())), expected)
            assert llm.nexus.stats().io_engine == {"uring": "io_uring"}.get(engine, engine)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no tmpfs at /dev/shm")
def test_a_file_system_without_direct_reads_works_and_says_so(expected: np.ndarray) -> None:
    path = Path("/dev/shm") / f"nexus-test-{os.getpid()}.gguf"
    shutil.copy(find_model(NAME), path)
    try:
        with paged(path, "700K", policy="direct") as llm:
            assert np.array_equal(logits(llm, prompt(40, llm.n_vocab())), expected)
            stats = llm.nexus.stats()
            assert stats.io_mode == "buffered"
            assert stats.direct_reason
    finally:
        path.unlink()


def test_a_budget_that_is_too_small_names_the_smallest_that_is_not() -> None:
    path = find_model(NAME)
    with pytest.raises(DoesNotFit) as failure:
        Llama(path, weights=1000, **SMALL)
    with paged(path, failure.value.smallest_bytes) as llm:
        assert llm.nexus.active


def test_memory_that_cannot_be_had_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    """The pool does not fit in the address space that the process may have."""
    script = """
import resource, sys
import nexus_ext.runtime
from nexus_ext import Llama
from nexus_ext.errors import OutOfMemory
from nexus_ext.core import Model
pool = "ring 68719476736\\nslab 65536\\nscratch 0\\nvirtual 0\\n"
text = f"nexus-manifest 1\\n{pool}io direct\\nend 0\\n"
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    Model(text)
except OutOfMemory as error:
    print("OutOfMemory:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "OutOfMemory" in done.stdout
    assert "68719476736" in done.stdout


def test_a_closed_model_says_that_it_is_closed() -> None:
    with paged(find_model(NAME), "700K") as llm:
        handle = llm.nexus
    for use in (
        lambda: llm("Once"),
        lambda: llm.eval([1]),
        lambda: llm.tokenize(b"Once"),
        lambda: llm.nexus,
        lambda: llm.create_embedding("Once"),
        lambda: llm.save_state(),
    ):
        with pytest.raises(ModelClosed):
            use()
    with pytest.raises(NexusError):
        handle.stats()
    llm.close()  # again: nothing happens


def test_closing_gives_back_memory_and_descriptors() -> None:
    def footprint() -> tuple[int, int]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not a leak
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    path = find_model("tinydense-7M-Q4_K_M.gguf")
    sizes = []
    for _ in range(13):
        with paged(path, "2M", n_ctx=128, n_batch=64) as llm:
            logits(llm, prompt(30, llm.n_vocab()))
        sizes.append(footprint())
    assert sizes[-1][1] == sizes[2][1]
    assert sizes[-1][0] - sizes[2][0] < path.stat().st_size, "ten more models, not one more kept"


def test_ctrl_c_stops_within_a_token_and_the_model_goes_on(expected: np.ndarray) -> None:
    """SIGINT while native code runs: the prompt ends early, the next call is right."""
    with paged(find_model("tinydense-7M-Q4_K_M.gguf"), "1500K", n_ubatch=64) as llm:
        tokens = prompt(600, llm.n_vocab())
        logits(llm, tokens, n_decode=1)
        passes = llm.nexus.stats().passes
        main = threading.main_thread().ident
        assert main is not None
        # When the first micro-batch has run, so in the middle of the evaluation.
        model = llm.nexus.model
        assert model is not None
        before = model.stats().passes

        def interrupt() -> None:
            while model.stats().passes < before + 2:
                pass
            signal.pthread_kill(main, signal.SIGINT)

        watcher = threading.Thread(target=interrupt, daemon=True)
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(200):
                llm.reset()
                llm.eval(tokens)
        watcher.join()
        assert llm.nexus.stats().passes < passes + 200 * 10
        fresh = logits(llm, prompt(64, llm.n_vocab()))
    with stock(find_model("tinydense-7M-Q4_K_M.gguf"), n_ubatch=64) as llm:
        assert np.array_equal(fresh, logits(llm, prompt(64, llm.n_vocab())))


def test_ctrl_c_while_a_model_is_loaded_is_not_lost_in_a_log_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        """Where Ctrl-C is pressed when llama.cpp begins to tell what it loads."""

        n_interrupts = 0

        def write(self, text: str) -> int:
            if "llama_model_loader" in text and not self.n_interrupts:
                self.n_interrupts = 1
                signal.raise_signal(signal.SIGINT)
            return len(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyboardInterrupt):
        Llama(find_model("tinydense-7M-Q4_K_M.gguf"), weights="1500K", verbose=True)
    assert terminal.n_interrupts == 1
