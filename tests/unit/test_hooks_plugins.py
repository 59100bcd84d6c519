"""Plugins from outside: found by entry point, selected, ranked, and harmless when they break."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nexus_ext.errors import DoesNotFit
from nexus_ext.hardware import HardwareProfile
from nexus_ext.hookspecs import PLUGIN_API
from nexus_ext.placement import PlanRequest, solve
from nexus_ext.plugin_registry import GROUP, PluginRecord
from nexus_ext.plugins import Plugins
from nexus_ext.plugins.asking import OBSERVER_FAILURES
from nexus_ext.policies import CacheInfo, IoInfo, ModelInfo
from nexus_ext.types import Catalog
from nexus_ext.units import MIB
from tests.cli_support import call
from tests.hook_plugins import Install, installer
from tests.unit.test_placement_builders import machine, model

INFO = IoInfo(streamed_bytes=1, resident_bytes=0, available_bytes=100, limit_bytes=None)
MODEL = ModelInfo("m.gguf", "f" * 32, "llama", 1, 0, None)
POLICY = """
from nexus_ext import hookimpl
class Policy:
    name = {name!r}
    def choose(self, info):
        return {mode!r}
@hookimpl
def nexus_io_policy():
    return Policy()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    return installer(tmp_path / "site-packages", monkeypatch)


def records(plugins: Plugins) -> dict[str, PluginRecord]:
    """Return the plugins of a test: others may be installed beside them."""
    found = (r for r in plugins.list_plugins() if not r.builtin)
    return {r.name: r for r in found if not r.distribution.startswith("nexus-")}


def test_an_installed_plugin_replaces_the_builtin(install: Install) -> None:
    install("ours", POLICY.format(name="ours", mode="direct"))
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "direct"
    assert plugins.io_policy().name == "ours"
    assert records(plugins)["ours"] == PluginRecord(
        name="ours",
        distribution="dist-ours",
        version="1.2",
        state="active",
        hooks=("nexus_io_policy",),
        decides=("nexus_io_policy",),
    )


def test_none_loads_no_plugin_but_lists_it(install: Install) -> None:
    install("ours", "raise AssertionError('imported')")
    for value in ("none", ""):
        plugins = Plugins(environ={"NEXUS_LOAD_PLUGINS": value})
        assert plugins.io_policy().name == "fits-page-cache"
        assert records(plugins)["ours"].state == "skipped"


def test_named_plugins_are_loaded_and_no_others(install: Install) -> None:
    install("a", POLICY.format(name="a", mode="direct"))
    install("b", POLICY.format(name="b", mode="direct"))
    plugins = Plugins(environ={"NEXUS_LOAD_PLUGINS": "b, absent"})
    states = {name: record.state for name, record in records(plugins).items()}
    assert states == {"a": "skipped", "b": "active", "absent": "missing"}
    assert plugins.io_policy().name == "b"


def test_of_two_plugins_the_first_name_wins_and_the_other_is_named(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("zebra", POLICY.format(name="z", mode="direct"))
    install("apple", POLICY.format(name="a", mode="buffered"))
    plugins = Plugins(environ={})
    found = records(plugins)
    assert plugins.io_policy().name == "a"
    assert found["apple"].decides == ("nexus_io_policy",)
    assert found["zebra"].decides == ()
    assert found["zebra"].overridden == ("nexus_io_policy",)
    assert (found["apple"].state, found["zebra"].state) == ("active", "overridden")
    assert "'apple' is used, 'zebra' not" in caplog.text


def test_a_plugin_that_answers_none_leaves_the_choice_to_the_next(install: Install) -> None:
    install("a", "from nexus_ext import hookimpl\n@hookimpl\ndef nexus_io_policy():\n    pass\n")
    assert Plugins(environ={}).io_policy().name == "fits-page-cache"


def test_two_distributions_with_one_entry_point_name(install: Install) -> None:
    install("same", POLICY.format(name="x", mode="direct"), distribution="x")
    install("same", POLICY.format(name="y", mode="direct"), distribution="y")
    plugins = Plugins(environ={})
    states = {r.distribution: r.state for r in plugins.list_plugins() if r.name == "same"}
    assert states == {"x": "active", "y": "failed"}
    assert plugins.io_policy().name == "x"


BROKEN = {
    "import": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "syntax": ("def (", "SyntaxError"),
    "exit": ("import sys; sys.exit(3)", "SystemExit"),
    "no-hook": ("x = 1", "implements no hook"),
    "unknown-hook": (
        "from nexus_ext import hookimpl\n@hookimpl\ndef nexus_no_such_hook(): pass",
        "'nexus_no_such_hook' is not a hook",
    ),
    "unknown-argument": (
        "from nexus_ext import hookimpl\n@hookimpl\ndef nexus_io_policy(color): pass",
        "color",
    ),
    "wrapper": (
        "from nexus_ext import hookimpl\n"
        "@hookimpl(wrapper=True)\ndef nexus_io_policy():\n    return (yield)",
        "is a wrapper",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_skipped(
    kind: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    code, reason = BROKEN[kind]
    install("broken", code)
    install("good", POLICY.format(name="good", mode="direct"))
    plugins = Plugins(environ={})
    assert plugins.io_policy().name == "good"
    record = records(plugins)["broken"]
    assert record.state == "failed"
    assert reason in record.error
    assert "plugin 'broken' of 'dist-broken' skipped" in caplog.text


WRONG_ANSWERS = {
    "hook raises": ("@hookimpl\ndef nexus_io_policy():\n    return 1 / 0", "ZeroDivisionError"),
    "no policy": ("@hookimpl\ndef nexus_io_policy():\n    return 7", "is no IoPolicy"),
    "policy raises": (
        "class P:\n    name = 'p'\n    def choose(self, info):\n        return {}['x']\n"
        "@hookimpl\ndef nexus_io_policy():\n    return P()",
        "KeyError",
    ),
    "no mode": (
        "class P:\n    name = 'p'\n    def choose(self, info):\n        return 'magic'\n"
        "@hookimpl\ndef nexus_io_policy():\n    return P()",
        "'magic'",
    ),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_a_plugin_that_fails_at_a_decision_is_disabled_by_name_and_the_builtin_decides(
    kind: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    code, reason = WRONG_ANSWERS[kind]
    install("faulty", "from nexus_ext import hookimpl\n" + code)
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "buffered"
    record = records(plugins)["faulty"]
    assert (record.state, record.disabled, record.decides) == ("disabled", ("nexus_io_policy",), ())
    assert reason in record.error
    assert caplog.text.count("plugin 'faulty' of 'dist-faulty' is disabled") == 1
    assert plugins.choose_io(INFO) == "buffered"
    assert caplog.text.count("is disabled") == 1  # it was not asked again


def test_the_next_plugin_is_asked_before_the_builtin(install: Install) -> None:
    code, _ = WRONG_ANSWERS["policy raises"]
    install("a-faulty", "from nexus_ext import hookimpl\n" + code)
    install("b", POLICY.format(name="b", mode="direct"))
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "direct"
    states = {name: record.state for name, record in records(plugins).items()}
    assert states == {"a-faulty": "disabled", "b": "active"}
    assert records(plugins)["b"].decides == ("nexus_io_policy",)


OBSERVER = """
from nexus_ext import hookimpl
seen = []
@hookimpl
def nexus_model_loaded(info):
    seen.append(info.path)
@hookimpl
def nexus_request_done():
    raise RuntimeError("no disk left")
"""


def test_observers_see_what_happens_and_cannot_stop_it(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("watch", OBSERVER)
    plugins = Plugins(environ={})
    plugins.model_loaded(MODEL)
    plugins.request_done(None)  # type: ignore[arg-type]
    plugins.model_closed(MODEL)
    assert sys.modules["plugin_dist_watch_watch"].seen == ["m.gguf"]
    assert "plugin 'watch': nexus_request_done raised RuntimeError: no disk left" in caplog.text
    assert records(plugins)["watch"].state == "active"
    assert "no disk left" in records(plugins)["watch"].error
    for _ in range(OBSERVER_FAILURES):
        plugins.request_done(None)  # type: ignore[arg-type]
    record = records(plugins)["watch"]
    assert (record.state, record.disabled) == ("disabled", ("nexus_request_done",))
    plugins.model_loaded(MODEL)  # the rest of it goes on
    assert sys.modules["plugin_dist_watch_watch"].seen == ["m.gguf"] * 2


COMMANDS = """
import click
from nexus_ext import hookimpl
@hookimpl
def nexus_register_commands(cli):
    @cli.command()
    def hello():
        click.echo("hello from a plugin")
    @cli.command()
    def run():
        click.echo("hijacked")
"""


def test_a_plugin_adds_commands_and_replaces_none(install: Install) -> None:
    @click.group()
    def cli() -> None: ...

    @cli.command()
    def run() -> None:
        click.echo("built in")

    install("commands", COMMANDS)
    install("crash", COMMANDS.replace("    @cli", "    1 / 0\n    @cli", 1))
    Plugins(environ={}).register_commands(cli)
    assert CliRunner().invoke(cli, ["hello"]).output == "hello from a plugin\n"
    assert CliRunner().invoke(cli, ["run"]).output == "built in\n"


def test_tracing_writes_registrations_and_calls_to_stderr(install: Install, tmp_path: Path) -> None:
    install("ours", POLICY.format(name="ours", mode="direct"))
    code = "import nexus_ext; nexus_ext.list_plugins()"
    environ = {"PYTHONPATH": str(tmp_path / "site-packages"), "NEXUS_TRACE_PLUGINS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "nexus plugins: registered ours: nexus_io_policy" in done.stderr
    assert "nexus plugins: nexus_io_policy of ours -> " in done.stderr


def test_the_process_looks_for_plugins_once(
    monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    from nexus_ext import plugins as module

    monkeypatch.setattr(module, "_plugins", None)
    install("ours", POLICY.format(name="ours", mode="direct"))
    first = module.plugins()
    assert {e.name for e in entry_points(group=GROUP)} >= {"ours"}
    assert module.plugins() is first
    assert module.list_plugins() == first.list_plugins()


SOLVER = """
from dataclasses import replace
from nexus_ext import hookimpl
from nexus_ext.errors import DoesNotFit
from nexus_ext.placement import solve, Pin
class Solver:
    name = "theirs"
    def solve(self, catalog, hardware, request):
        plan = solve(catalog, hardware, request)
        return {expression}
    def refuse(self):
        raise DoesNotFit("too small", smallest_bytes=7)
@hookimpl
def nexus_placement_solver():
    return Solver()
"""
REQUEST = PlanRequest(weights_bytes=2 * MIB)


@pytest.fixture(scope="module")
def small() -> tuple[Catalog, HardwareProfile]:
    """A small model that does not fit in REQUEST, and a machine."""
    return model(), machine()


def test_a_plugin_places_a_model(install: Install, small: tuple[Catalog, HardwareProfile]) -> None:
    pinned = "solve(catalog, hardware, replace(request, pins=(Pin('attn_q', 'nvme'),)))"
    install("theirs", SOLVER.format(expression=pinned))
    plugins = Plugins(environ={})
    plan = plugins.solve(*small, REQUEST)
    assert all(tier == "nvme" for name, tier in plan.tiers.items() if "attn_q" in name)
    assert records(plugins)["theirs"].decides == ("nexus_placement_solver",)


def test_that_a_plugin_finds_no_plan_is_not_the_last_word(
    install: Install, small: tuple[Catalog, HardwareProfile], caplog: pytest.LogCaptureFixture
) -> None:
    install("theirs", SOLVER.format(expression="self.refuse()"))
    plugins = Plugins(environ={})
    assert plugins.solve(*small, REQUEST) == solve(*small, REQUEST)
    assert "too small; the next one is asked" in caplog.text
    assert records(plugins)["theirs"].state == "active"
    with pytest.raises(DoesNotFit, match="The model needs"):
        plugins.solve(*small, replace(REQUEST, weights_bytes=1))


BAD_PLANS = {
    "1 / 0": "raised ZeroDivisionError",
    "None": "which is no Plan",
    "replace(plan, fingerprint='f2')": "it is for the model 'f2'",
    "replace(plan, tiers={'output.weight': 'nvme'})": "leaves out",
    "replace(plan, tiers={**plan.tiers, 'x': 'ram'})": "places 'x'",
    "replace(plan, tiers=dict.fromkeys(plan.tiers, 'nvme'))": "cannot be on nvme",
    "replace(plan, tiers={k: 'ram' if t == 'nvme' else t for k, t in plan.tiers.items()},"
    " everything_fits=True)": "bytes for pinned weights, which take",
    "replace(plan, ring_bytes=0, breakdown={**plan.breakdown, 'ring': 0})": "sum to|the ring of 0",
    "replace(plan, slab_bytes=plan.slab_bytes * 2)": "the slabs of that ring have",
    "replace(plan, tiers=7)": "raised|is int",
    "replace(plan, n_gpu_layers=3)": "n_gpu_layers is 3",
    "replace(plan, budget=replace(plan.budget, weights_bytes=1 << 40))": "keeps to",
}


@pytest.mark.parametrize("expression", BAD_PLANS)
def test_a_plugin_that_places_badly_is_disabled_and_the_builtin_places(
    expression: str, install: Install, small: tuple[Catalog, HardwareProfile]
) -> None:
    install("theirs", SOLVER.format(expression=expression))
    plugins = Plugins(environ={})
    assert plugins.solve(*small, REQUEST) == solve(*small, REQUEST)
    record = records(plugins)["theirs"]
    assert record.state == "disabled"
    assert re.search(BAD_PLANS[expression], record.error), record.error


@pytest.mark.parametrize(
    ("answer", "what"), [('"crystal ball"', "'crystal ball'"), ("3", "3"), ("1 // 0", "division")]
)
def test_a_predictor_that_answers_nonsense_is_disabled(
    install: Install, answer: str, what: str
) -> None:
    code = POLICY.replace("nexus_io_policy", "nexus_expert_predictor").replace("{mode!r}", answer)
    install("seer", code.format(name="seer"))
    plugins = Plugins(environ={})
    assert plugins.choose_predictor(CacheInfo(2, 8, 2, 4)) == "auto"
    assert what in records(plugins)["seer"].error


def test_a_plugin_may_choose_another_predictor(install: Install) -> None:
    code = POLICY.replace("nexus_io_policy", "nexus_expert_predictor")
    install("seer", code.format(name="seer", mode="none"))
    assert Plugins(environ={}).choose_predictor(CacheInfo(2, 8, 2, 4)) == "none"


API = "nexus_plugin_api = {api}\n" + POLICY.format(name="p", mode="direct")


def test_a_plugin_for_this_version_of_the_api_is_used(install: Install) -> None:
    install("p", API.format(api=PLUGIN_API))
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "direct"
    assert records(plugins)["p"].api == PLUGIN_API


def test_a_plugin_for_a_newer_api_is_skipped_with_a_sentence(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("p", API.format(api=PLUGIN_API + 1))
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "buffered"
    record = records(plugins)["p"]
    assert record.state == "skipped"
    assert record.error.startswith(f"it needs version {PLUGIN_API + 1} of the plugin API")
    assert "update nexus_ext" in caplog.text


@pytest.mark.parametrize("api", ["0", "'1'", "True", "1.0", "None"])
def test_a_version_of_the_api_that_is_none_is_refused(install: Install, api: str) -> None:
    install("p", API.format(api=api))
    record = records(Plugins(environ={}))["p"]
    assert record.state == "failed"
    assert "nexus_plugin_api is" in record.error


def test_one_module_under_two_names_is_registered_once(install: Install) -> None:
    install("a", POLICY.format(name="a", mode="direct"))
    install("b", "raise SystemExit(1)")
    twice = [EntryPoint(n, "plugin_dist_a_a", GROUP) for n in ("first", "second")]
    plugins = Plugins(found=twice, environ={})
    states = {r.name: r.state for r in plugins.list_plugins() if not r.builtin}
    assert states == {"second": "active", "first": "failed"}
    assert plugins.choose_io(INFO) == "direct"


def test_what_a_slow_plugin_takes_is_counted_and_said_once(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("nexus_ext.plugins.asking.time.perf_counter", lambda: float(next(clock)))
    install("slow", POLICY.format(name="slow", mode="direct"))
    plugins = Plugins(environ={})
    for _ in range(3):
        assert plugins.choose_io(INFO) == "direct"
    assert records(plugins)["slow"].seconds == 8  # its hook and three answers, two seconds each
    assert caplog.text.count("plugin 'slow' has taken 2.0 s in nexus_io_policy") == 1


def test_the_command_shows_every_plugin_with_its_state_hooks_and_errors(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("apple", POLICY.format(name="a", mode="direct"))
    install("zebra", POLICY.format(name="z", mode="direct"))
    install("broken", "raise LookupError('not today')")
    install("newer", API.format(api=PLUGIN_API + 1))
    install("rubbish", "from nexus_ext import hookimpl\n" + WRONG_ANSWERS["no policy"][0])
    plugins = Plugins(environ={})
    monkeypatch.setattr("nexus_ext.plugins._plugins", plugins)

    def lines() -> list[list[str]]:
        return [line.split() for line in call("plugins").out.splitlines() if line.strip()]

    shown = lines()
    origin = ["1.2", "nexus_io_policy"]
    for expected in (
        ["apple", "active", "dist-apple", *origin, "decides"],
        ["zebra", "overridden", "dist-zebra", *origin, "apple", "decides"],
        ["rubbish", "disabled", "dist-rubbish", *origin, "disabled"],
        ["broken", "failed", "dist-broken", "1.2", "-"],
        ["newer", "skipped", "dist-newer", "1.2", "-"],
        ["broken:", "LookupError:", "not", "today"],
        ["rubbish:", *"nexus_io_policy returned 7, which is no IoPolicy".split()],
    ):
        assert expected in shown, expected
    plugins.disable("apple", "nexus_io_policy", "went wrong")
    told = call("plugins", "--json").json
    assert told["api"] == PLUGIN_API
    by_name = {p["name"]: p for p in told["plugins"]}
    apple, zebra = by_name["apple"], by_name["zebra"]
    assert (apple["version"], apple["distribution"]) == ("1.2", "dist-apple")
    assert apple["disabled"] == apple["hooks"] == ["nexus_io_policy"]
    assert (apple["state"], apple["error"]) == ("disabled", "nexus_io_policy went wrong")
    assert (zebra["state"], zebra["decides"]) == ("active", ["nexus_io_policy"])
    assert ["apple", "disabled", "dist-apple", *origin, "disabled"] in lines()
