"""Which channels are corrected: what repairs most for its time, in a model that is made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.runtime import residual_tuning
from nexus_ext.runtime.residual_tuning import (
    PROBES,
    SHARES,
    Effect,
    Floats,
    distribute,
    divergence,
    hedged,
    observe,
)

KINDS = ("attn_qkv", "ffn_down")


def nanoseconds(effect: Effect, share: float) -> float:
    return 1e9 * effect.cost(share)


def test_between_and_beyond_the_probes_an_effect_is_a_power_law() -> None:
    effect = Effect("x", (1.0, 4.0), (0.1, 0.2))
    assert effect.worth(0) == effect.cost(0) == 0
    assert effect.worth(PROBES[0]) == pytest.approx(0.1)
    assert effect.worth(PROBES[1]) == pytest.approx(0.2)
    exponent = math.log(2) / math.log(PROBES[1] / PROBES[0])
    assert effect.worth(0.03) == pytest.approx(0.1 * 0.5**exponent)
    assert effect.cost(0.11) == pytest.approx(2.5)
    assert effect.cost(0.03) == pytest.approx(0.5)
    slow_to_begin = Effect("x", (1.0, 1.5), (0.1, 0.2))
    assert slow_to_begin.cost(0.02) == pytest.approx(0.8)


def test_noise_makes_no_effect_of_the_wrong_sign() -> None:
    for seconds in ((-1.0, -2.0), (3.0, 1.0), (-1.0, 2.0)):
        for repaired in ((-0.1, -0.2), (0.2, 0.1), (-0.1, 0.2), (0.1, -0.1)):
            effect = Effect("x", seconds, repaired)
            costs, worths = [effect.cost(s) for s in SHARES], [effect.worth(s) for s in SHARES]
            assert costs == sorted(costs) and costs[0] == 0
            assert worths == sorted(worths) and worths[0] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(1e-6, 1e-3) for _ in range(4))).map(
            lambda v: ((v[0], v[0] + v[1]), (v[2], v[2] + v[3]))
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 3_000_000),
)
def test_channels_are_dealt_out_as_well_as_by_trying_all(
    measured: list[tuple[tuple[float, float], tuple[float, float]]], budget: int
) -> None:
    effects = [Effect(f"k{i}", *both) for i, both in enumerate(measured)]
    found = distribute(effects, budget, nanoseconds)
    assert list(found) == [e.kind for e in effects]
    assert sum(nanoseconds(e, found[e.kind]) for e in effects) <= budget
    best = 0.0
    for shares in itertools.product(SHARES, repeat=len(effects)):
        pairs = list(zip(effects, shares, strict=True))
        if sum(math.ceil(nanoseconds(e, s)) for e, s in pairs) <= budget:
            best = max(best, sum(e.worth(s) for e, s in pairs))
    worth = sum(e.worth(found[e.kind]) for e in effects)
    assert worth >= 0.999 * best


def test_half_is_the_same_for_all_kinds() -> None:
    effects = [Effect("a", (1.0, 4.0), (0.0, 0.0)), Effect("b", (1.0, 4.0), (0.1, 0.2))]
    cost = nanoseconds
    assert distribute(effects, 2_000_000_000, cost) == {"a": 0.0, "b": 0.08}
    assert hedged(effects, 2_000_000_000, cost) == pytest.approx({"a": 0.03, "b": 0.07}, abs=1e-5)
    assert hedged(effects, 0, cost) == {"a": 0.0, "b": 0.0}


def test_what_repairs_nothing_gets_nothing() -> None:
    effects = [Effect("a", (1e-6, 1e-6), (0.0, -1.0)), Effect("b", (1.0, 4.0), (0.1, 0.2))]
    assert distribute(effects, 2_000_000_000, nanoseconds) == {"a": 0.0, "b": 0.08}
    assert distribute(effects, 0, nanoseconds) == {"a": 0.0, "b": 0.0}


def test_a_model_is_observed_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(residual_tuning.time, "perf_counter", lambda: clock[0])
    exact = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    wrong = np.log(np.array([0.4, 0.3, 0.3], np.float32))
    positions: list[tuple[int, int]] = []

    def run(shares: Mapping[str, float], token: int, position: int) -> Floats:
        positions.append((token, position))
        clock[0] += 1.0 + 2 * shares["attn_qkv"] + 5 * shares["ffn_down"]
        near = min(1.0, 4 * shares["ffn_down"] + shares["attn_qkv"])
        return (exact * near + wrong * (1 - near)).astype(np.float32)

    seen = observe(KINDS, run, 2, most_tokens=6, most_seconds=1e9)
    assert positions[0] == (2, 0) and positions[-1][1] == 6
    assert {p for _, p in positions} == set(range(7))
    assert seen.token_s == pytest.approx(1.0)
    assert seen.divergence == pytest.approx(divergence(exact, wrong), rel=1e-5)
    assert seen.effects[0].seconds == pytest.approx((0.12, 0.32))
    assert seen.effects[1].seconds == pytest.approx((0.3, 0.8))
    assert 0 < seen.effects[0].repaired[0] < seen.effects[1].repaired[0]
    positions.clear()
    observe(KINDS, run, 2, most_tokens=60, most_seconds=0)
    assert positions[-1][1] == 4  # enough to go by
