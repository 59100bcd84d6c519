"""Policies and predictors of plugins while tokens are computed: whatever they do, the same bits."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus_ext import hookimpl
from nexus_ext.policies import EvictionAsk, LayerCachePolicy, LayerPredictor, NativePolicy
from nexus_ext.testing import load_plugins, use_plugins
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.integration.streaming import Bits
from tests.integration.test_experts import assert_equal, cached, core_model, reference
from tests.native_plugin import LRU, compiled, native

DIMS = MoeDims(n_experts=12, n_used=3)
SLOTS = 5

# A policy and a predictor whose harm is chosen by number.
HOSTILE = """
#include <string.h>
int harm = 0;
static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    (void)state;
    memcpy(out, ask->experts, ask->n_wanted * sizeof *out);
    switch (harm) {
    case 1: out[0] = -1; break;
    case 2: out[ask->n_wanted - 1] = ask->incoming[0]; break;
    case 3: out[0] = 1 << 30; break;
    case 4: return 1;
    case 5: memset(out, 0x7f, ask->n_wanted * sizeof *out); break;
    }
    return 0;
}
nxp_cache_policy policy = {
    .head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "hostile"),
    .victims = victims,
};

uint32_t told = 0, tokens = 0;
static void routed(void *state, const nxp_routed *r) { (void)state; told++; tokens += r->n_tokens; }
static int32_t predict(void *state, const nxp_predict_ask *ask, int32_t *out) {
    (void)state;
    for (uint32_t i = 0; i < ask->capacity; i++) out[i] = (int32_t)(ask->capacity - 1 - i);
    switch (harm) {
    case 1: out[0] = -1; break;
    case 2: out[0] = out[1]; break;
    case 3: out[0] = (int32_t)ask->capacity; break;
    case 4: return -5;
    case 5: return INT32_MAX;
    }
    return (int32_t)ask->capacity;
}
nxp_predictor predictor = {
    .head = NXP_HEAD(nxp_predictor, NXP_PREDICTOR, "rubbish"),
    .routed = routed,
    .predict = predict,
};
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Bits]]:
    path = tmp_path_factory.mktemp("native") / "model.gguf"
    write_moe(path, dims=DIMS)
    return path, reference(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("hostile"), HOSTILE)


def set_harm(library: ctypes.CDLL, number: int) -> None:
    ctypes.c_int.in_dll(library, "harm").value = number


def test_a_policy_in_c_decides_and_is_counted(
    model: tuple[Path, dict[int, Bits]], tmp_path: Path
) -> None:
    path, expected = model
    with cached(path, SLOTS) as llm:
        core_model(llm).set_predictor("none")
        evictions = {}
        for policy in ("lru", native(compiled(tmp_path, LRU))):
            core_model(llm).set_cache_policy(policy)
            assert_equal(llm, expected, "from what the last one left")
            llm.nexus.reset_stats()
            assert_equal(llm, expected, str(policy))
            stats = llm.nexus.stats()
            evictions[stats.cache_policy] = core_model(llm).stats().expert_evictions
            assert stats.disabled == () and stats.policy_s > 0
        assert list(evictions) == ["lru", "my-lru"]
        assert evictions["lru"] > 20
        assert evictions["my-lru"] == pytest.approx(evictions["lru"], rel=0.1)  # ties differ


@pytest.mark.parametrize("harm", range(1, 6))
def test_a_hostile_policy_in_c_is_disabled_by_name_and_changes_no_bit(
    harm: int, model: tuple[Path, dict[int, Bits]], library: ctypes.CDLL
) -> None:
    path, expected = model
    with cached(path, SLOTS) as llm:
        set_harm(library, 0)
        core_model(llm).set_cache_policy(native(library))
        assert_equal(llm, expected, "while it behaves")
        assert llm.nexus.stats().disabled == ()
        set_harm(library, harm)
        assert_equal(llm, expected, "while it does harm")
        [disabled] = llm.nexus.stats().disabled
        assert disabled.startswith("hostile: ")
        calls = core_model(llm).cache_policy().calls
        assert_equal(llm, expected, "and after")
        assert core_model(llm).cache_policy().calls == calls


@pytest.mark.parametrize("harm", range(1, 6))
def test_a_hostile_predictor_in_c_is_disabled_by_name_and_changes_no_bit(
    harm: int, model: tuple[Path, dict[int, Bits]], library: ctypes.CDLL
) -> None:
    path, expected = model
    with cached(path, SLOTS) as llm:
        told = ctypes.c_uint32.in_dll(library, "told")
        before = told.value
        set_harm(library, 0)
        core_model(llm).set_predictor(native(library, "predictor", automatic=False))
        assert_equal(llm, expected, "while it behaves")
        assert llm.nexus.stats().disabled == ()
        assert told.value > before
        assert core_model(llm).stats().prefetched > 0
        assert llm.nexus.stats().predicting
        set_harm(library, harm)
        assert_equal(llm, expected, "while it does harm")
        [disabled] = llm.nexus.stats().disabled
        assert disabled.startswith("rubbish: ")
        assert_equal(llm, expected, "and after")


def test_a_predictor_that_is_on_only_while_it_helps_is_told_all_the_same(
    model: tuple[Path, dict[int, Bits]], library: ctypes.CDLL
) -> None:
    path, _ = model
    with cached(path, SLOTS) as llm:
        tokens = ctypes.c_uint32.in_dll(library, "tokens")
        set_harm(library, 0)
        core_model(llm).set_predictor(native(library, "predictor"))
        before = tokens.value
        llm.eval([1, 5, 9])
        llm.eval([7])
        # llama.cpp may compute the last layer for the last token alone.
        assert 4 * (DIMS.n_layers - 1) < tokens.value - before <= 4 * DIMS.n_layers
        assert core_model(llm).predictor_plugin().name == "rubbish"


class Layerwise:
    """A predictor and a policy in Python; `harm` says which of its functions raises."""

    name = "layerwise"
    automatic = False

    def __init__(self, harm: str = "") -> None:
        self.harm = harm
        self.calls: list[tuple[str, int]] = []

    def _note(self, what: str, layer: int) -> None:
        self.calls.append((what, layer))
        if what == self.harm:
            raise RuntimeError("harm")

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._note("used", layer)
        assert len(set(experts)) == len(experts)

    def victims(self, ask: EvictionAsk) -> Sequence[int]:
        self._note("victims", ask.layer)
        return ask.experts[: ask.n_wanted]

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        self._note("routed", layer)
        assert all(len(experts) == DIMS.n_used for experts in tokens)

    def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> Sequence[int]:
        self._note("predict", layer)
        assert n_used == DIMS.n_used and limit > 0
        return range(DIMS.n_experts)


def test_policies_in_python_are_asked_once_a_layer(model: tuple[Path, dict[int, Bits]]) -> None:
    path, expected = model
    policy = Layerwise()
    assert isinstance(policy, LayerCachePolicy) and isinstance(policy, LayerPredictor)
    with cached(path, SLOTS) as llm:
        core_model(llm).set_cache_policy(policy)
        core_model(llm).set_predictor(policy)
        assert_equal(llm, expected, "in Python")
        policy.calls.clear()
        llm.eval([4])
        for layer in range(DIMS.n_layers):
            assert policy.calls.count(("used", layer)) == 1
            assert policy.calls.count(("routed", layer)) == 1
            # once for what it asks for, once for what is read ahead for it
            assert policy.calls.count(("victims", layer)) <= 2
            assert policy.calls.count(("predict", layer)) == (layer > 0)
        assert llm.nexus.stats().disabled == ()


@pytest.mark.parametrize("harm", ["used", "victims", "routed", "predict"])
def test_a_policy_in_python_that_raises_is_disabled_and_logged(
    harm: str, model: tuple[Path, dict[int, Bits]], caplog: pytest.LogCaptureFixture
) -> None:
    path, expected = model
    policy = Layerwise(harm)
    with cached(path, SLOTS) as llm:
        core_model(llm).set_cache_policy(policy)
        core_model(llm).set_predictor(policy)
        assert_equal(llm, expected, harm)
        assert len(llm.nexus.stats().disabled) == 1
        raised = policy.calls.count((harm, policy.calls[-1][1]))
        assert raised <= 1 + DIMS.n_layers
        with caplog.at_level(logging.ERROR):
            paged = llm.nexus.paged
            assert paged is not None
            paged.tell_failures()
            paged.tell_failures()
    assert caplog.text.count("was disabled") == 1
    assert f"{harm} raised" in caplog.text


def test_a_model_that_was_closed_calls_no_plugin(
    model: tuple[Path, dict[int, Bits]], tmp_path: Path
) -> None:
    code = LRU.replace(
        ".victims = victims",
        ".create = create, .destroy = destroy, .victims = victims",
    ).replace(
        "static int victims",
        """
        #include <stdlib.h>
        int alive = 0, created = 0;
        static void *create(void *user, const nxp_cache_layer *layer) {
            (void)user, (void)layer;
            alive++, created++;
            return malloc(1);
        }
        static void destroy(void *state) { alive--; free(state); }
        static int victims""",
        1,
    )
    library = compiled(tmp_path, code, "counting")
    alive = ctypes.c_int.in_dll(library, "alive")
    created = ctypes.c_int.in_dll(library, "created")
    with cached(model[0], SLOTS) as llm:
        core_model(llm).set_cache_policy(native(library))
        llm.eval([1, 2, 3])
        assert alive.value == created.value == DIMS.n_layers
    assert alive.value == 0


class Chooser:
    name = "chooser"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def choose(self, info: Any) -> Any:
        assert info.n_experts == DIMS.n_experts and info.slots == SLOTS
        return self.answer


def choosing(name: str, **answers: Any) -> ModuleType:
    """Return a plugin of this name that answers the hooks with these policies."""
    plugin = ModuleType(name)
    for hook, answer in answers.items():
        chooser = Chooser(answer)
        setattr(plugin, hook, hookimpl(lambda chooser=chooser: chooser, specname=hook))
    return plugin


def test_a_plugin_s_policy_comes_in_through_the_hook(
    model: tuple[Path, dict[int, Bits]], tmp_path: Path
) -> None:
    path, expected = model
    policy = native(compiled(tmp_path, LRU))
    answers = {"nexus_cache_policy": policy, "nexus_expert_predictor": Layerwise()}
    plugin = choosing("chooser", **answers)
    with use_plugins(load_plugins(plugin)), cached(path, SLOTS) as llm:
        assert_equal(llm, expected, "through the hook")
        assert llm.nexus.stats().cache_policy == "my-lru"
        assert core_model(llm).predictor_plugin().name == "layerwise"
        assert isinstance(policy, NativePolicy)


@pytest.mark.parametrize(
    ("hook", "symbol"),
    [("nexus_cache_policy", "policy"), ("nexus_expert_predictor", "predictor")],
)
def test_of_several_plugins_the_one_that_failed_is_disabled(
    hook: str, symbol: str, model: tuple[Path, dict[int, Bits]], library: ctypes.CDLL
) -> None:
    """Also when it fails in a second model: by then others would be asked first."""
    path, expected = model
    answers = {
        "absurd": "rubbish",
        "first": native(library, symbol, automatic=False),
        "second": Layerwise(),
    }
    plugins = load_plugins(*(choosing(name, **{hook: answers[name]}) for name in answers))
    set_harm(library, 0)
    with use_plugins(plugins), cached(path, SLOTS) as llm, cached(path, SLOTS) as other:
        set_harm(library, 4)
        for each in (llm, other):
            assert_equal(each, expected, "while it does harm")
            assert each.nexus.paged is not None
            each.nexus.paged.tell_failures()
        assert [name for name, _, _ in plugins.disabled()] == ["absurd", "first"]
        assert [len(each.nexus.stats().disabled) for each in (llm, other)] == [2, 2]
        with cached(path, SLOTS) as later:
            assert_equal(later, expected, "with the next plugin")
            core = core_model(later)
            assert "second" in (core.cache_policy().plugin, core.predictor_plugin().plugin)
            assert len(later.nexus.stats().disabled) == 2
