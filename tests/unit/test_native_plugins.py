"""Plugins in C: compiled against the installed header, asked as by the cache, refused in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nexus_ext
from nexus_ext.errors import PluginError, UsageError
from nexus_ext.native_plugins import replay as replay_layer
from nexus_ext.native_plugins import replay_trace
from nexus_ext.policies import EvictionAsk, NativePolicy
from nexus_ext.routing import BELADY, POLICIES, RoutingTrace, TracedLayer, replay
from nexus_ext.routing.replay import decisions
from tests.native_plugin import LRU, compiled, native

N_EXPERTS, N_USED = 24, 4


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    rng = np.random.default_rng(3)
    layers = []
    for layer in range(2):
        weights = rng.permutation(-np.log(np.arange(1, N_EXPERTS + 1)))
        keys = weights + rng.gumbel(size=(1500, N_EXPERTS))
        rows = np.argsort(-keys, axis=1)[:, :N_USED].astype(np.uint8)
        layers.append(TracedLayer(layer, N_EXPERTS, N_USED, 1, 1, rows.tobytes()))
    return RoutingTrace("f", "test", (1,) * 1500, tuple(layers))


def tokens(trace: RoutingTrace, layer: int) -> list[list[int]]:
    return [[e for e in row if e >= 0] for row in decisions(trace)[:, layer].tolist()]


def test_the_header_is_installed_alone() -> None:
    directory = Path(nexus_ext.get_include())
    assert [path.name for path in directory.iterdir()] == ["nexus_plugin.h"]


@pytest.mark.parametrize("standard", ["c11", "c++17"])
def test_the_header_compiles_by_itself(standard: str, tmp_path: Path) -> None:
    language = "c++" if "+" in standard else "c"
    source = tmp_path / "alone.c"
    source.write_text("#include <nexus_plugin.h>\nint main(void) { return NXP_API_VERSION - 1; }\n")
    command = [
        "cc",
        f"-x{language}",
        f"-std={standard}",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
    ]
    command += [f"-I{nexus_ext.get_include()}", str(source), "-o", str(tmp_path / "alone")]
    subprocess.run(command, check=True)
    subprocess.run([str(tmp_path / "alone")], check=True)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("random", BELADY)])
@pytest.mark.parametrize("slots", [4, 9, 23])
def test_the_built_ins_in_c_are_the_formulas_that_are_replayed(
    policy: str, slots: int, trace: RoutingTrace
) -> None:
    [[expected]] = replay(trace, [policy], [[slots, slots]])
    found = [replay_layer(policy, tokens(trace, i), N_EXPERTS, slots)[0] for i in range(2)]
    assert tuple(found) == expected.misses


def test_a_policy_that_a_test_has_compiled_decides(trace: RoutingTrace, tmp_path: Path) -> None:
    policy = native(compiled(tmp_path, LRU))
    used = tokens(trace, 0)
    misses, use = replay_layer(policy, used, N_EXPERTS, 9)
    assert misses == replay_layer("lru", used, N_EXPERTS, 9)[0]
    assert (use.name, use.why) == ("my-lru", "")
    assert 0 < use.calls < len(used)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("policy.head.api_version = 2", "version 2 .* has version 1: install a newer nexus_ext"),
        ("policy.head.api_version = 0", "version 0 .* build it with nexus_ext.get_include"),
        ("policy.head.struct_size = 40", "my-lru has a struct of 40 bytes"),
        ("policy.head.kind = NXP_PREDICTOR", "another struct"),
        ("policy.victims = 0", "my-lru has no function `victims`"),
    ],
)
def test_another_version_is_refused_with_the_plugin_s_name_and_a_remedy(
    change: str, words: str, tmp_path: Path
) -> None:
    library = compiled(tmp_path, f"{LRU}\nvoid change(void) {{ {change}; }}\n")
    library.change()
    with pytest.raises(PluginError, match=f"plugin 'policy': .*{words}") as refused:
        replay_layer(native(library), [[1]], 4, 2)
    assert refused.value.hint


def test_no_address_and_no_such_name_are_refused() -> None:
    with pytest.raises(PluginError, match="address 0"):
        replay_layer(NativePolicy("empty", 0), [[1]], 4, 2)
    with pytest.raises(UsageError, match="crystal"):
        replay_layer("crystal", [[1]], 4, 2)


def test_a_replay_with_too_few_slots_is_refused() -> None:
    with pytest.raises(UsageError, match="slot"):
        replay_layer("lru", [[1, 2, 3]], 4, 2)


class Oldest:
    """LRU in Python, by what it was told and by what it was asked."""

    name = "oldest"

    def __init__(self) -> None:
        self.clock = 0
        self.last: dict[int, int] = {}
        self.asks: list[EvictionAsk] = []

    def used(self, layer: int, experts: list[int]) -> None:
        self.clock += 1
        self.last.update(dict.fromkeys(experts, self.clock))

    def victims(self, ask: EvictionAsk) -> list[int]:
        self.asks.append(ask)
        for expert, age in zip(ask.experts, ask.ages, strict=True):
            assert age == self.clock - self.last[expert]
        return sorted(ask.experts, key=lambda e: self.last[e])[: ask.n_wanted]


def test_a_policy_in_python_is_asked_once_a_token(trace: RoutingTrace) -> None:
    policy, used = Oldest(), tokens(trace, 1)
    misses, use = replay_layer(policy, used, N_EXPERTS, 9, layer=5)
    # Of experts that were used last by one token, which goes first is the policy's affair.
    assert misses == pytest.approx(replay_layer("lru", used, N_EXPERTS, 9)[0], rel=0.02)
    assert (use.name, use.why, use.calls) == ("oldest", "", len(used) + len(policy.asks))
    assert {ask.layer for ask in policy.asks} == {5}
    assert not any(ask.ahead for ask in policy.asks)
    assert max(ask.n_wanted for ask in policy.asks) > 1


@pytest.mark.parametrize("what", ["raises", "None", "too few", "text", "used raises", "exit"])
def test_a_policy_in_python_that_fails_is_the_default_from_there(
    what: str, trace: RoutingTrace, caplog: pytest.LogCaptureFixture
) -> None:
    class Bad(Oldest):
        name = "bad"

        def used(self, layer: int, experts: list[int]) -> None:
            if what == "used raises":
                raise LookupError("lost")

        def victims(self, ask: EvictionAsk) -> list[int]:
            if what == "exit":
                raise SystemExit(3)
            answers = {"None": None, "too few": [], "text": ["a"] * ask.n_wanted}
            return answers[what]  # type: ignore[return-value]

    used = tokens(trace, 0)
    misses, use = replay_layer(Bad(), used, N_EXPERTS, 9)
    assert misses == replay_layer("lfru", used, N_EXPERTS, 9)[0]
    assert "victims" in use.why
    assert "'bad'" in caplog.text


def test_finding_the_header_loads_nothing() -> None:
    code = (
        "import nexus_ext, sys; nexus_ext.get_include(); print('nexus_ext._native' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_trace_is_replayed_layer_by_layer(trace: RoutingTrace, tmp_path: Path) -> None:
    [[expected]] = replay(trace, ["lru"], [[9, 3]])
    found, disabled = replay_trace(trace, "lru", [9, 3])
    assert found == expected and disabled == ()
    ours, _ = replay_trace(trace, native(compiled(tmp_path, LRU)), [9, 3])
    assert ours.policy == "policy" and ours.misses == expected.misses
