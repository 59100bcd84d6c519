"""Headers that make llama.cpp abort are refused before it sees them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ext.errors import FormatError
from nexus_ext.formats import open_model
from nexus_ext.runtime.loadable import check_loadable
from nexus_ext.testing.synthetic import write_llama, write_moe
from nexus_ext.types import Catalog


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("moe") / "model.gguf"
    write_moe(path)
    catalog = open_model(str(path))
    check_loadable(catalog)
    return catalog


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 0}, "block_count' is 0; llama.cpp wants 1 to 512"),
        ({"n_layers": 513}, "block_count' is 513; llama.cpp wants 1 to 512"),
        ({"n_experts": 1025}, "expert_count' is 1025; llama.cpp wants 0 to 1024"),
        ({"n_experts_used": 9}, "expert_used_count' is 9; llama.cpp wants 1 to 8"),
        ({"n_experts_used": 0}, "expert_used_count' is 0; llama.cpp wants 1 to 8"),
        ({"n_experts": 0}, "expert_used_count' is 2; llama.cpp wants 0"),
    ],
)
def test_sizes_out_of_range_are_named(moe: Catalog, change: dict[str, int], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        check_loadable(replace(moe, shape=replace(moe.shape, **change)))


@pytest.mark.parametrize(
    ("groups", "used", "said"),
    [
        (8, 1, "expert_group_count' is 8; llama.cpp wants 0 to 7"),
        (3, 1, "expert_group_count' is 3; llama.cpp wants a divisor of 8"),
        (4, 4, "expert_group_used_count' is 4; llama.cpp wants 1 to 3"),
        (4, 0, "expert_group_used_count' is 0; llama.cpp wants 1 to 3"),
    ],
)
def test_groups_of_experts_are_checked(moe: Catalog, groups: int, used: int, said: str) -> None:
    prefix = moe.shape.architecture
    keys = {f"{prefix}.expert_group_count": groups, f"{prefix}.expert_group_used_count": used}
    with pytest.raises(FormatError, match=said):
        check_loadable(replace(moe, metadata={**moe.metadata, **keys}))


def test_a_model_of_too_many_layers_is_an_error_and_no_abort(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    write_llama(path, n_layers=513, n_embd=64, n_ff=64, n_heads=2, n_heads_kv=1, n_vocab=320)
    command = [sys.executable, "-m", "nexus_ext.cli", "run", str(path), "x", "--weights", "1M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "llama.cpp wants 1 to 512" in done.stderr
