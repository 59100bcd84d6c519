"""A hostile plugin changes no token and stops no run: streamed, shared, converted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nexus_ext.plugins import Plugins
from nexus_ext.testing.synthetic import write_moe
from tests.cli_support import call
from tests.hook_plugins import installer
from tests.hostile import MODES, hostile_plugins
from tests.integration.mux import a_prompt, answer, multiplexer, run, takes
from tests.integration.streaming import Bits, logits, paged, prompt
from tests.integration.test_experts import cached
from tests.models_folder import find_model

DENSE = find_model("stories260K-q4_0.gguf")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe(tmp_path_factory.mktemp("moe") / "moe.gguf")[0]


def dense_bits(failures: list[str] | None = None) -> Bits:
    with paged(DENSE, "300K", n_ctx=64, n_batch=64, n_ubatch=32, policy="auto") as llm:
        assert llm.nexus.active
        bits = logits(llm, prompt(20, llm.n_vocab()))
        if failures is not None:
            failures += llm.nexus.stats().disabled
        return bits


def moe_bits(path: Path) -> Bits:
    with cached(path, 4, io_mode="auto") as llm:
        return logits(llm, prompt(20, llm.n_vocab()))


@pytest.fixture(scope="module")
def expected(moe: Path) -> tuple[Bits, Bits]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nexus_ext.plugins._plugins", Plugins(found=(), environ={}))
        return dense_bits(), moe_bits(moe)


@pytest.mark.parametrize("mode", MODES)
def test_streamed_tokens_are_the_same(
    mode: str, moe: Path, expected: tuple[Bits, Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = hostile_plugins(mode, monkeypatch)
    failures: list[str] = []
    assert np.array_equal(dense_bits(failures), expected[0])
    assert any(f.startswith("hostile-again: ") for f in failures) == (mode != "hooks are slow")
    assert np.array_equal(moe_bits(moe), expected[1])
    record = next(r for r in plugins.list_plugins() if r.name == "hostile-again")
    asked = {"nexus_io_policy", "nexus_cache_policy", "nexus_expert_predictor"}
    asked |= {"nexus_kernel_provider"}
    if mode != "hooks are slow":
        assert asked <= set(record.disabled)


@pytest.mark.parametrize("mode", ["hooks raise", *(m for m in MODES if m.startswith("objects"))])
def test_models_that_share_memory_answer_as_ever(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = a_prompt(1, 12)
    budget = sum(takes("bit")) + takes("tiny")[0]  # one of the two, whole

    async def ask() -> list[list[int]]:
        async with multiplexer(budget) as mux:
            return [(await answer(mux, name, question))[0] for name in ("bit", "tiny", "bit")]

    async def test() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nexus_ext.plugins._plugins", Plugins(found=(), environ={}))
            alone = await ask()
        plugins = hostile_plugins(mode, monkeypatch)
        assert await ask() == alone
        record = next(r for r in plugins.list_plugins() if r.name == "hostile-again")
        assert "nexus_eviction_policy" in record.disabled

    run(test())


@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_gives_the_file_back(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile_plugins(mode, monkeypatch)
    stored, back = tmp_path / "model.nxf", tmp_path / "back.gguf"
    codec = "hostile" if mode.startswith("objects") else "ans"
    done = call("convert", str(DENSE), str(stored), "--codec", codec)
    assert done.status == 0, done.err
    assert call("convert", str(stored), str(back)).status == 0
    assert back.read_bytes() == DENSE.read_bytes()


INSTALLED = """
import os
from hostile_support import hostile
nexus_plugin_api = 1
globals().update(vars(hostile(os.environ["HOSTILE"])))
"""


@pytest.mark.parametrize("mode", ["hooks exit", "objects raise"])
def test_an_installed_one_stops_no_command(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    """As an installer lays it out, found by its entry point, in processes of its own."""
    installer(tmp_path / "site", monkeypatch)("hostile", INSTALLED)
    shutil.copy(repository / "tests" / "hostile.py", tmp_path / "site" / "hostile_support.py")
    command = [sys.executable, "-m", "nexus_ext.cli"]
    run_it = ["run", DENSE, "--weights", "300K", "-n", "8", "--temp", "0", "--quiet", "Once"]

    def process(*arguments: object, load: str) -> subprocess.CompletedProcess[str]:
        environ = {
            **os.environ,
            "HOSTILE": mode,
            "NEXUS_LOAD_PLUGINS": load,
            "PYTHONPATH": str(tmp_path / "site"),
        }
        line = [*command, *map(str, arguments)]
        return subprocess.run(line, env=environ, capture_output=True, text=True, check=False)

    alone = process(*run_it, load="none")
    assert alone.returncode == 0 and len(alone.stdout) > 10, alone.stderr
    beside = process(*run_it, load="hostile")
    assert (beside.returncode, beside.stdout) == (0, alone.stdout), beside.stderr
    listed = process("plugins", "--json", load="hostile")
    others = {p["name"]: p for p in json.loads(listed.stdout)["plugins"] if not p["builtin"]}
    found = others.pop("hostile")
    assert {p["state"] for p in others.values()} <= {"skipped"}  # whatever else is installed
    assert (found["name"], found["distribution"], found["version"]) == (
        *("hostile", "dist-hostile", "1.2"),
    )
    assert found["state"] == ("active" if mode.startswith("objects") else "disabled")
