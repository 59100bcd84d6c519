"""Chains count what follows what: checked against counts made by hand, and against their files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nexus_predictor_markov.chain import SMOOTHING, STEP, Chain, Shape, train
from nexus_predictor_markov.follower import Follower, MarkovPredictor

from nexus_ext.formats import Learned
from nexus_ext.hooks import CacheInfo, ExpertPredictor, FormatError, LayerPredictor, UsageError
from nexus_ext.routing import RoutingTrace, TracedLayer, mean_score, rank_popular, score


def trace_of(
    rows: list[list[list[int]]], n_experts: int, passes: tuple[int, ...] = ()
) -> RoutingTrace:
    """Return a trace of [layer][token][k] experts."""
    n_tokens = len(rows[0])
    layers = tuple(
        TracedLayer(2 * i + 1, n_experts, len(row[0]), 1024, 1024, bytes(e for t in row for e in t))
        for i, row in enumerate(rows)
    )
    return RoutingTrace("f" * 32, "test", passes or (1,) * n_tokens, layers)


def drawn(n_tokens: int, seed: int = 0, n_experts: int = 8) -> RoutingTrace:
    """A layer that goes on by a rule with noise, and one that follows from the layer before."""
    rng = np.random.default_rng(seed)
    first, second = [0], []
    for t in range(n_tokens):
        if t:
            noise = rng.random() < 0.3
            first.append(int(rng.integers(n_experts)) if noise else (first[-1] * 3 + 1) % n_experts)
        noise = rng.random() < 0.3
        second.append(int(rng.integers(n_experts)) if noise else (first[-1] + 5) % n_experts)
    return trace_of([[[e] for e in first], [[e] for e in second]], n_experts)


def test_lifts_are_the_log_odds_of_smoothed_counts() -> None:
    chain = train(trace_of([[[0], [1]] * 50, [[2], [3]] * 50], 4))
    share = np.array([51, 51, 1, 1]) / 104
    np.testing.assert_allclose(chain.popularity[0], np.log(share), rtol=1e-6)
    given = (50 + SMOOTHING * share[1]) / (50 + SMOOTHING)  # 1 after 0
    assert chain.time[0, 0, 1] == round(math.log(given / share[1]) / STEP)
    given = (50 + SMOOTHING * share[0]) / (50 + SMOOTHING)  # 2 in the second layer below 0
    assert chain.layer[0, 0, 2] == round(math.log(given / share[0]) / STEP)
    assert not chain.time[0, 3].any()  # never used: says nothing


def test_where_a_text_begins_nothing_follows() -> None:
    rows = [[[0], [1]] * 60]
    together = train(trace_of(rows, 4))
    apart = train(trace_of(rows, 4, passes=(2,) * 60))
    assert together.time[0, 1, 0] > 0 and apart.time[0, 1, 0] == 0


def test_what_follows_is_predicted_beyond_popularity_on_tokens_that_were_not_seen() -> None:
    learned, held_out = drawn(2000), drawn(500, seed=1)
    chain = train(learned)
    assert chain.time_weight > 0 and chain.layer_weight > 0
    chained = score("markov", held_out, chain.rank(held_out))
    popular = mean_score(score("popular", held_out, rank_popular(learned, held_out))).slots
    assert all(one.slots > 0.65 for one in chained) and popular < 0.3
    np.testing.assert_array_equal(chain.rank_popular(500), rank_popular(learned, held_out))


def test_noise_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    rows = [[[int(e)] for e in rng.choice(8, 3000, p=[0.65, *[0.05] * 7])] for _ in range(2)]
    chain = train(trace_of(rows, 8))
    held_out = trace_of([[[0]] * 50] * 2, 8)
    assert mean_score(score("markov", held_out, chain.rank(held_out))).slots == 1.0


def test_following_a_model_ranks_as_ranking_its_trace() -> None:
    chain, trace = train(drawn(1000)), drawn(60, seed=2)
    ranked = chain.rank(trace)
    follower = Follower(chain, chain.shape.layers)
    assert isinstance(follower, LayerPredictor)
    for t in range(trace.n_tokens):
        for i, layer in enumerate(trace.layers):
            assert follower.predict(i, 1, 3, 2) == ranked[t, i, :3].tolist(), (t, i)
            follower.routed(i, layer.numbers()[t : t + 1].tolist())


def test_a_part_of_the_layers_can_be_followed_and_a_prompt_gets_what_is_popular() -> None:
    chain = train(drawn(1000))
    follower = Follower(chain, chain.shape.layers[1:])
    follower.routed(0, [[1], [2]])
    alone = np.argsort(-chain.scores(1, [2], None), kind="stable")
    assert follower.predict(0, 1, 8, 2) == alone.tolist()
    assert follower.predict(0, 20, 1, 2) == chain.popular[1]
    with pytest.raises(KeyError):
        Follower(chain, (0,))


def test_models_that_the_chain_was_not_trained_for_are_left_to_the_builtin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chain = train(drawn(200))
    predictor = MarkovPredictor(chain)
    assert isinstance(predictor, ExpertPredictor)
    info = CacheInfo(2, 8, 1, 4, fingerprint=chain.fingerprint, layers=chain.shape.layers)
    assert isinstance(predictor.choose(info), Follower)
    assert isinstance(predictor.choose(replace(info, layers=(3,))), Follower)
    assert predictor.choose(replace(info, fingerprint="g")) == "auto" and "not used" in caplog.text
    assert predictor.choose(replace(info, layers=(0, 1))) == "auto"


def test_a_file_gives_back_the_chain(tmp_path: Path) -> None:
    chain = train(drawn(500))
    path = tmp_path / "c.nxmarkov"
    size = chain.learned().write(path)
    assert path.stat().st_size == size < 1000
    read = Chain.read(str(path))
    for name in ("fingerprint", "architecture", "shape", "n_tokens", "time_weight", "layer_weight"):
        assert getattr(read, name) == getattr(chain, name)
    for name in ("popularity", "time", "layer"):
        np.testing.assert_array_equal(getattr(read, name), getattr(chain, name))


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        ({"layers": [1]}, {}),
        ({"layers": []}, {}),
        ({"layers": "x"}, {}),
        ({"n_used": 0}, {}),
        ({"n_used": 9}, {}),
        ({"n_experts": 9}, {}),
        ({"time_weight": None}, {}),
        ({}, {"time": np.zeros((2, 8, 8), np.int16)}),
        ({}, {"popularity": np.zeros((2, 7), np.float32)}),
    ],
)
def test_files_that_do_not_hold_a_chain_are_refused(facts: dict, arrays: dict) -> None:
    good = train(drawn(200)).learned()
    bad = replace(good, facts={**good.facts, **facts}, arrays={**good.arrays, **arrays})
    with pytest.raises(FormatError, match=r"^x\.nxmarkov: "):
        Chain.of(bad, source="x.nxmarkov")


def test_a_file_that_lacks_something_is_refused() -> None:
    good = train(drawn(200)).learned()
    for name in good.facts:
        facts = {key: value for key, value in good.facts.items() if key != name}
        with pytest.raises(FormatError, match=name):
            Chain.of(replace(good, facts=facts), source="x")
    for name in good.arrays:
        arrays = {key: value for key, value in good.arrays.items() if key != name}
        with pytest.raises(FormatError, match=name):
            Chain.of(Learned(good.kind, 1, "f", good.facts, arrays), source="x")


def test_traces_that_a_chain_is_not_for_are_refused() -> None:
    chain, trace = train(drawn(200)), drawn(50)
    with pytest.raises(UsageError, match="trained for"):
        chain.rank(replace(trace, fingerprint="g" * 32))
    a, b = trace.layers
    mixed = replace(trace, layers=(a, replace(b, n_experts=9)))
    with pytest.raises(UsageError, match="2 numbers of experts"):
        Shape.of(mixed)
