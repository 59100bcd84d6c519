"""The default cache policy is as good as the better of its two, wherever that changes."""

from __future__ import annotations

import pytest

from nexus_ext.native_plugins import replay_builtin
from nexus_ext.routing import BELADY, DEFAULT, ONLINE, RoutingTrace, replay
from nexus_ext.testing import RECORDED, recorded_trace, synthetic_trace

OTHERS = ("lfru", "lru", "lfu", "least-stale")
TRACES: dict[str, dict[str, float]] = {
    "popular": {"zipf": 1.0},
    "reused": {"reuse": 0.5},
    "topics of 256": {"zipf": 1.0, "topic": 256},
    "topics of 64": {"zipf": 1.2, "topic": 64, "reuse": 0.3},
}
NOISE = 0.005  # of the uses: how far policies are apart where nothing can be predicted


def hits(trace: RoutingTrace, slots: int) -> dict[str, float]:
    sizes = [[slots] * len(trace.layers)]
    [found] = replay(trace, [DEFAULT, *OTHERS, BELADY], sizes, by_code=replay_builtin)
    return {one.policy: one.hit_rate for one in found}


def test_the_default_is_one_of_the_online_policies() -> None:
    assert set(ONLINE) == {DEFAULT, *OTHERS, "random"}


@pytest.mark.parametrize("name", TRACES)
def test_the_default_is_within_noise_of_the_best(name: str) -> None:
    trace = synthetic_trace(2000, 64, 6, **TRACES[name])  # type: ignore[arg-type]
    for slots in (8, 16, 32, 56):
        found = hits(trace, slots)
        assert found[DEFAULT] >= max(found[other] for other in OTHERS) - 2 * NOISE, slots
        assert found[DEFAULT] >= found["lru"] - NOISE, slots
        assert found[DEFAULT] <= found[BELADY]


@pytest.mark.parametrize("name", RECORDED)
def test_on_text_the_default_hits_more_than_every_formula(name: str) -> None:
    trace = recorded_trace(name)
    for slots in (8, 16, 24):
        found = hits(trace, slots)
        assert found[DEFAULT] > max(found[other] for other in OTHERS), slots


def test_it_follows_when_what_helps_changes_and_changes_back() -> None:
    """Popular experts, then a scan in which only recency helps, then the popular ones again."""
    popular = synthetic_trace(1500, 64, 4, zipf=1.2, n_layers=1, seed=1)
    topics = synthetic_trace(1500, 64, 4, zipf=1.2, topic=48, reuse=0.5, n_layers=1, seed=2)
    layer = popular.layers[0]
    experts = layer.experts + topics.layers[0].experts + layer.experts
    joined = RoutingTrace(
        "joined",
        "synthetic",
        (1,) * 4500,
        (type(layer)(0, 64, 4, layer.record_bytes, layer.slot_bytes, experts),),
    )
    found = hits(joined, 16)
    assert found[DEFAULT] >= max(found[other] for other in OTHERS) - NOISE
    assert found[DEFAULT] > found["lru"] + 0.02


def test_a_cache_of_one_tokens_experts_holds_what_repeats() -> None:
    trace = synthetic_trace(300, 16, 4, reuse=0.8, n_layers=1)
    found = hits(trace, 4)
    assert found[DEFAULT] == found["lru"] > 0.5  # every policy must do the same there
