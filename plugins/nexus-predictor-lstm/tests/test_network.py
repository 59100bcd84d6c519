"""The gradients are those of the loss, and training learns what can be learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nexus_predictor_lstm.follower import Follower, LstmPredictor
from nexus_predictor_lstm.network import Adam, Size, hot, initial, loss_and_gradients, start
from nexus_predictor_lstm.train import Lstm, Settings, train

from nexus_ext.formats import Learned
from nexus_ext.hooks import CacheInfo, ExpertPredictor, FormatError, LayerPredictor, UsageError
from nexus_ext.routing import RoutingTrace, TracedLayer, compare, mean_score, score

SIZE = Size(n_layers=3, n_experts=5, n_hidden=4)


def in_turn(
    n_tokens: int, n_experts: int, n_layers: int = 2, fingerprint: str = "f"
) -> RoutingTrace:
    """Experts in a fixed turn: what a token uses follows from the token before."""
    layers = []
    for i in range(n_layers):
        numbers = [(t + i) % n_experts for t in range(n_tokens)]
        layers.append(TracedLayer(i, n_experts, 1, 1024, 1024, bytes(numbers)))
    return RoutingTrace(fingerprint, "test", (1,) * n_tokens, tuple(layers))


@pytest.mark.parametrize("use_above", [False, True])
def test_gradients_are_the_slopes_of_the_loss(use_above: bool) -> None:
    rng = np.random.default_rng(1)
    p = {name: rng.normal(0, 0.5, shape) for name, shape in SIZE.shapes().items()}
    used = rng.permuted(np.tile(np.arange(5), (6, 2, 3, 1)), axis=-1)[..., :2]
    used[2, 1, 0, 1] = -1  # a token that uses one expert less
    tokens = hot(SIZE, used, np.float64)
    fresh = np.zeros((6, 2), bool)
    fresh[3, 0] = True  # a text begins in the middle
    state = tuple(rng.normal(0, 0.5, (2, 4)) for _ in range(2))

    def loss() -> float:
        return loss_and_gradients(p, SIZE, tokens, fresh, state, use_above)[0]

    _, grads, _ = loss_and_gradients(p, SIZE, tokens, fresh, state, use_above)
    assert grads.keys() == p.keys()
    for name, array in p.items():
        flat, slope = array.reshape(-1), grads[name].reshape(-1)
        for at in rng.choice(flat.size, min(flat.size, 25), replace=False):
            kept, step = flat[at], 1e-6
            flat[at] = kept + step
            above = loss()
            flat[at] = kept - step
            below = loss()
            flat[at] = kept
            assert slope[at] == pytest.approx((above - below) / (2 * step), abs=1e-7), name
    assert use_above == bool(np.any(grads["above"]))


def test_nothing_flows_across_the_beginning_of_a_text() -> None:
    p = initial(SIZE)
    used = np.zeros((4, 1, 3, 1), np.int64)
    fresh = np.array([[False], [True], [False], [False]])
    state = (np.ones((1, 4), np.float32), np.ones((1, 4), np.float32))
    other = start(SIZE, 1)
    a = loss_and_gradients(p, SIZE, hot(SIZE, used), fresh, state, True)
    b = loss_and_gradients(p, SIZE, hot(SIZE, used), fresh, other, True)
    assert a[0] == b[0] and np.array_equal(a[2][0], b[2][0])


def test_adam_goes_down_and_clips() -> None:
    p = {"x": np.array([3.0])}
    adam = Adam(p, rate=0.1, clip=1.0)
    for _ in range(300):
        adam.update(p, {"x": 1000 * p["x"]})
    assert abs(p["x"][0]) < 0.1
    adam.update(p, {"x": np.zeros(1)})  # no gradient, no division by it


def test_what_follows_from_the_past_is_learned_and_training_can_be_repeated() -> None:
    trace = in_turn(600, 6)
    said: list[float] = []
    settings = Settings(n_hidden=16, n_epochs=12, n_lanes=8, n_steps=16, rate=1e-2, use_above=False)
    network = train(trace, settings, lambda epoch, loss, slots: said.append(loss))
    assert said[-1] < 0.5 * said[0]
    held_out = in_turn(97, 6)
    assert mean_score(score("lstm", held_out, network.rank(held_out))).slots > 0.95
    again = train(trace, settings)
    assert all(np.array_equal(a, again.parameters[n]) for n, a in network.parameters.items())


@pytest.fixture(scope="module")
def network() -> Lstm:
    return train(in_turn(200, 6), Settings(n_hidden=8, n_epochs=2, n_lanes=4, n_steps=8))


def test_a_file_holds_the_network_in_half_precision(network: Lstm, tmp_path) -> None:
    path = str(tmp_path / "n.nxlstm")
    size = network.learned().write(path)
    read = Lstm.read(path)
    assert size < 4000 and read.size == network.size and read.layers == network.layers
    for name, array in network.parameters.items():
        np.testing.assert_allclose(read.parameters[name], array, rtol=1e-3, atol=1e-4)
    trace = in_turn(60, 6)
    assert compare(trace, {"lstm": read.rank(trace)}).scores["lstm"]


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        ({"n_hidden": 9}, {}),
        ({"n_hidden": 0}, {}),
        ({"n_used": 7}, {}),
        ({"layers": []}, {}),
        ({"layers": None}, {}),
        ({"n_experts": "many"}, {}),
        ({}, {"bias": np.zeros(12, np.float32)}),
        ({}, {"bias": np.zeros(11, np.float16)}),
    ],
)
def test_files_that_do_not_hold_a_network_are_refused(network: Lstm, facts, arrays) -> None:
    good = network.learned()
    bad = Learned(
        good.kind,
        good.version,
        good.fingerprint,
        {**good.facts, **facts},
        {**good.arrays, **arrays},
    )
    with pytest.raises(FormatError, match=r"^x\.nxlstm: "):
        Lstm.of(bad, source="x.nxlstm")
    missing = {name: array for name, array in good.arrays.items() if name != "embed"}
    with pytest.raises(FormatError, match="embed"):
        Lstm.of(Learned("lstm", 1, "f", good.facts, missing), source="x")


def test_a_trace_of_another_model_is_refused(network: Lstm) -> None:
    for other in (in_turn(20, 6, fingerprint="g"), in_turn(20, 5), in_turn(20, 6, n_layers=3)):
        with pytest.raises(UsageError, match="trained for"):
            network.rank(other)


def test_traces_that_cannot_be_learned_from_are_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        train(in_turn(63, 6))
    a, b = in_turn(100, 6).layers
    mixed = RoutingTrace("f", "test", (1,) * 100, (a, TracedLayer(1, 7, 1, 1, 1, b.experts)))
    with pytest.raises(UsageError, match="2 numbers of experts"):
        train(mixed)


def test_following_a_model_ranks_as_ranking_its_trace(network: Lstm) -> None:
    trace = in_turn(40, 6)
    ranked = network.rank(trace)
    follower = Follower(network)
    assert isinstance(follower, LayerPredictor)
    for t in range(trace.n_tokens):
        for i, layer in enumerate(trace.layers):
            assert follower.predict(i, 1, 3, 2) == ranked[t, i, :3].tolist(), (t, i)
            follower.routed(i, layer.numbers()[t : t + 1].tolist())


def test_a_prompt_is_followed_although_its_last_layer_is_computed_for_fewer_tokens(
    network: Lstm,
) -> None:
    follower, other = Follower(network), Follower(network)
    assert sorted(follower.predict(0, 50, 1, 2)) == list(range(6))
    prompt = [[t % 6] for t in range(50)]
    for one, tokens in ((follower, prompt), (other, prompt[-32:])):
        one.routed(0, tokens)
        one.routed(1, [[3]])
        assert sorted(one.predict(1, 1, 6, 2)) == list(range(6))
    assert follower.predict(1, 1, 2, 2) == other.predict(1, 1, 2, 2)


def test_models_that_the_network_was_not_trained_for_are_left_to_the_builtin(
    network: Lstm, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = LstmPredictor(network)
    assert isinstance(predictor, ExpertPredictor)
    info = CacheInfo(2, 6, 1, 4, fingerprint=network.fingerprint, layers=network.layers)
    assert isinstance(predictor.choose(info), Follower)
    assert predictor.choose(replace(info, fingerprint="g")) == "auto" and "not used" in caplog.text
    assert predictor.choose(replace(info, layers=(1,))) == "auto"
