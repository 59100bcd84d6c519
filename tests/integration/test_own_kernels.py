"""Our own kernels inside a running model: the same bits as stock llama.cpp on the ternary models,
resident and partly streamed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama, kernels
from nexus_ext.errors import UsageError
from nexus_ext.runtime.own_kernels import same_bits
from tests.cli_support import hardware_file, run
from tests.integration.streaming import SMALL, logits, paged, prompt, stock
from tests.models_folder import find_model

TOKENS = prompt(40, 500)
ARGUMENTS: dict[str, Any] = {**SMALL, "n_ctx": 512, "logits_all": True}
MODELS = ["bitllama-3M-tq2_0.gguf", "bitllama-3M-tq1_0.gguf"]


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    return find_model(request.param)


def test_resident_model_gives_the_bits_of_stock(path: Path) -> None:
    with stock(path, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with closing(Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == (path.stem.rpartition("-")[2],)
        assert llm.nexus.model is not None and llm.nexus.model.n_packed() == 56
        assert llm.nexus.model.attached_bytes() > 0
        seen = logits(llm, TOKENS)
    if same_bits(path.stem.rpartition("-")[2]):
        assert np.array_equal(seen, wanted)
    else:  # another order of summing
        a, b = seen.view(np.float32), wanted.view(np.float32)
        assert np.abs(a - b).max() < 0.05


@pytest.mark.parametrize("isa", kernels.usable_isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    path = find_model(MODELS[0])
    before = kernels.current_isa()
    with closing(Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)) as llm:
        wanted = logits(llm, TOKENS, n_decode=2)
        try:
            kernels.use_isa(isa)
            assert np.array_equal(logits(llm, TOKENS, n_decode=2), wanted)
        finally:
            kernels.use_isa(before)


def test_partly_streamed_model_gives_the_bits_of_stock() -> None:
    path = find_model(MODELS[0])
    with stock(path, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with paged(path, "1M", kernels="auto", n_ctx=512) as llm:
        seen = logits(llm, TOKENS)
        if same_bits("tq2_0"):
            assert 0 < llm.nexus.model.n_packed() < 56
            assert llm.nexus.stats().bytes_read > 0
        assert np.array_equal(seen, wanted)


def test_auto_takes_only_what_is_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_model(MODELS[0])
    monkeypatch.setattr("nexus_ext.runtime.own_kernels.same_bits", lambda name: False)
    with closing(Llama(path, ram="2G", kernels="auto", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == () and not llm.nexus.active
    monkeypatch.setattr("nexus_ext.runtime.own_kernels.same_bits", lambda name: None)
    with pytest.raises(UsageError, match="no place for our kernels"):
        Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)


def test_ggml_is_the_default_and_a_typing_mistake_is_named() -> None:
    path = find_model(MODELS[0])
    with closing(Llama(path, ram="2G", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == ()
    with pytest.raises(UsageError, match="'nexsu'"):
        Llama(path, ram="2G", kernels="nexsu", **ARGUMENTS)


def test_the_command_says_whose_kernels_it_uses(tmp_path: Path) -> None:
    hardware = hardware_file(tmp_path)
    options = [
        "--hardware",
        hardware,
        "--ram",
        "2G",
        "-t",
        "1",
        "--temp",
        "0",
        "-n",
        "8",
        "-c",
        "128",
    ]
    answers = {}
    for choice in ("ggml", "auto"):
        done = run("run", find_model(MODELS[0]), "Once", *options, "--kernels", choice)
        assert done.status == 0, done.err
        answers[choice] = done.out
        assert ("kernels for tq2_0" in done.err) == (choice == "auto" and bool(same_bits("tq2_0")))
    assert answers["auto"] == answers["ggml"]
