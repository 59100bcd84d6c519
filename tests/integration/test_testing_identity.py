"""assert_same_tokens passes where bits are the same, and tells where a run has shown nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nexus_ext import hookimpl
from nexus_ext.plugins import plugins
from nexus_ext.testing import (
    MoeDims,
    assert_same_tokens,
    identity,
    load_plugins,
    write_llama,
    write_moe,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "dense.gguf"
    write_llama(path, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=320)
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "moe.gguf"
    write_moe(path, dims=MoeDims(n_layers=2, n_experts=8, n_used=2))
    return path


def cache_policy(victims: Any) -> SimpleNamespace:
    """A plugin whose cache policy is this function, in Python."""
    evict = SimpleNamespace(name="mine", used=lambda layer, experts: None, victims=victims)
    policy = SimpleNamespace(name="mine", choose=lambda info: evict)
    return SimpleNamespace(nexus_cache_policy=hookimpl(lambda: policy), __name__="mine")


def test_a_model_is_the_same_with_a_policy_that_keeps_to_the_rules(moe: Path) -> None:
    asked: list[int] = []

    def last(ask: Any) -> list[int]:
        asked.append(ask.layer)
        return list(ask.experts[::-1][: ask.n_wanted])

    before = plugins()
    same = assert_same_tokens(moe, load_plugins(cache_policy(last)), n_tokens=5)
    assert set(asked) == {0, 1}
    assert (same.n_positions, same.n_vocab) == (48 + 5, 320)
    assert same.read_bytes > 0 and same.expert_hit_rate is not None
    assert 0 < same.expert_hit_rate < 1
    assert plugins() is before


def test_a_policy_that_fails_while_tokens_are_computed_is_named(moe: Path) -> None:
    def none(ask: Any) -> list[int]:
        return [-1] * ask.n_wanted

    with pytest.raises(AssertionError, match="mine"):
        assert_same_tokens(moe, load_plugins(cache_policy(none)), n_tokens=2)


def test_nothing_streamed_is_nothing_shown(dense: Path) -> None:
    with pytest.raises(AssertionError, match="fits, so nothing is streamed"):
        assert_same_tokens(dense, load_plugins(), weights="1G", n_tokens=1)


def test_one_bit_of_one_logit_is_noticed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, calls = identity._logits, []

    def flipped(llm: Any, prompt: Any, n_tokens: int) -> Any:
        found = logits(llm, prompt, n_tokens)
        calls.append(llm)
        if len(calls) == 2:
            found[49, 7] ^= 1
        return found

    monkeypatch.setattr(identity, "_logits", flipped)
    with pytest.raises(AssertionError, match="differ from position 49 on"):
        assert_same_tokens(dense, load_plugins(), n_tokens=3)
