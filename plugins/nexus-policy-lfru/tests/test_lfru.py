"""The policy hits more than one span would, answers what may be answered, and changes no token."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nexus_policy_lfru
import pytest

from nexus_ext import get_include
from nexus_ext.policies import CacheInfo, NativePolicy
from nexus_ext.routing import RoutingTrace, replay
from nexus_ext.testing import (
    RECORDED,
    FakeEngine,
    MoeDims,
    assert_same_tokens,
    load_plugins,
    recorded_trace,
    replay_trace,
    synthetic_trace,
    write_moe,
)

SOURCE = Path(__file__).resolve().parents[1] / "native" / "policy.c"


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> NativePolicy:
    """The policy as it stands here, compiled with the sanitizer that needs no preloading."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("policy") / "policy.so"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command = [compiler, *flags, f"-I{get_include()}", str(SOURCE), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    return nexus_policy_lfru.native_policy(str(library))


def hit_rates(trace: RoutingTrace, policy: NativePolicy, slots: int) -> tuple[float, float, float]:
    """This policy's, that of `lfru`, which counts over one span, and Belady's."""
    sizes = [slots] * len(trace.layers)
    ours, disabled = replay_trace(trace, policy, sizes)
    assert disabled == ()
    [(lfru, best)] = replay(trace, ["lfru", "belady"], [sizes])
    return ours.hit_rate, lfru.hit_rate, best.hit_rate


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("slots", [8, 16, 24])
def test_it_hits_more_than_one_span_on_a_trained_model(
    name: str, slots: int, policy: NativePolicy
) -> None:
    ours, lfru, best = hit_rates(recorded_trace(name), policy, slots)
    assert lfru < ours < best
    assert (ours - lfru) / (best - lfru) > 0.03


def test_it_follows_topics_that_change(policy: NativePolicy) -> None:
    trace = synthetic_trace(2000, 64, 6, zipf=1.0, topic=256)
    ours, lfru, best = hit_rates(trace, policy, 16)
    assert (ours - lfru) / (best - lfru) > 0.2


def test_where_nothing_can_be_learned_it_loses_nothing(policy: NativePolicy) -> None:
    ours, lfru, _ = hit_rates(synthetic_trace(2000, 32, 4), policy, 12)
    assert ours == pytest.approx(lfru, abs=0.01)


def test_one_expert_and_as_many_slots_as_experts(policy: NativePolicy) -> None:
    small = synthetic_trace(300, 3, 1, n_layers=1)
    for slots in (1, 2, 3):
        found, disabled = replay_trace(small, policy, [slots])
        assert disabled == () and found.misses[0] >= 3


def test_it_is_what_the_hook_answers(policy: NativePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexus_policy_lfru, "native_policy", lambda: policy)
    chosen = nexus_policy_lfru.LfruHistory().choose(CacheInfo(2, 8, 2, 4))
    assert chosen is policy
    run = FakeEngine(load_plugins(nexus_policy_lfru)).cache(recorded_trace())
    assert run.policy == "lfru-history"
    assert run.builtin.hit_rate == pytest.approx(run.chosen.hit_rate, abs=0.01)
    assert run.chosen.hit_rate < run.belady.hit_rate


def test_no_token_changes(
    policy: NativePolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    write_moe(model, dims=MoeDims(n_layers=4, n_experts=16))
    monkeypatch.setattr(nexus_policy_lfru, "native_policy", lambda: policy)
    same = assert_same_tokens(model, load_plugins(nexus_policy_lfru))
    assert same.expert_hit_rate is not None and 0.2 < same.expert_hit_rate < 1


def test_a_package_that_was_not_built_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexus_policy_lfru, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        nexus_policy_lfru.native_policy()
