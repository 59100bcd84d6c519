"""Plugins from outside: found by entry point, selected, ranked, and harmless when they break."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from nexus_ext.errors import DoesNotFit, PluginError
from nexus_ext.plugin_registry import GROUP, PluginRecord
from nexus_ext.plugins import Plugins
from nexus_ext.policies import CacheInfo, IoInfo, ModelInfo

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

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one plugin on sys.path, the way an installer lays it out."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name: str, code: str, *, distribution: str = "", version: str = "1.2") -> None:
        distribution = distribution or f"dist-{name}"
        module = re.sub(r"\W", "_", f"plugin_{distribution}_{name}")
        (site / f"{module}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}\n", encoding="utf-8")
        importlib.invalidate_caches()

    return add


def records(plugins: Plugins) -> dict[str, PluginRecord]:
    return {r.name: r for r in plugins.list_plugins() if r.state != "built-in"}


def test_an_installed_plugin_replaces_the_builtin(install: Install) -> None:
    install("ours", POLICY.format(name="ours", mode="direct"))
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "direct"
    assert plugins.io_policy().name == "ours"
    assert records(plugins)["ours"] == PluginRecord(
        name="ours",
        distribution="dist-ours",
        version="1.2",
        state="loaded",
        hooks=("nexus_io_policy",),
        decides=("nexus_io_policy",),
    )


def test_none_loads_no_plugin_but_lists_it(install: Install) -> None:
    install("ours", "raise AssertionError('imported')")
    for value in ("none", ""):
        plugins = Plugins(environ={"NEXUS_LOAD_PLUGINS": value})
        assert plugins.io_policy().name == "fits-page-cache"
        assert records(plugins)["ours"].state == "disabled"


def test_named_plugins_are_loaded_and_no_others(install: Install) -> None:
    install("a", POLICY.format(name="a", mode="direct"))
    install("b", POLICY.format(name="b", mode="direct"))
    plugins = Plugins(environ={"NEXUS_LOAD_PLUGINS": "b, absent"})
    states = {name: record.state for name, record in records(plugins).items()}
    assert states == {"a": "disabled", "b": "loaded", "absent": "missing"}
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
    assert "'apple' is used, 'zebra' not" in caplog.text


def test_a_plugin_that_answers_none_leaves_the_choice_to_the_next(install: Install) -> None:
    install("a", "from nexus_ext import hookimpl\n@hookimpl\ndef nexus_io_policy():\n    pass\n")
    assert Plugins(environ={}).io_policy().name == "fits-page-cache"


def test_two_distributions_with_one_entry_point_name(install: Install) -> None:
    install("same", POLICY.format(name="x", mode="direct"), distribution="x")
    install("same", POLICY.format(name="y", mode="direct"), distribution="y")
    plugins = Plugins(environ={})
    states = {r.distribution: r.state for r in plugins.list_plugins() if r.name == "same"}
    assert states == {"x": "loaded", "y": "failed"}
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
def test_a_plugin_that_fails_at_a_decision_is_named_and_not_replaced(
    kind: str, install: Install
) -> None:
    code, reason = WRONG_ANSWERS[kind]
    install("faulty", "from nexus_ext import hookimpl\n" + code)
    plugins = Plugins(environ={})
    with pytest.raises(PluginError, match="plugin 'faulty'") as caught:
        plugins.choose_io(INFO)
    assert reason in str(caught.value)
    assert "dist-faulty" in caught.value.hint
    assert reason in records(plugins)["faulty"].error


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
    assert records(plugins)["watch"].state == "loaded"
    assert "no disk left" in records(plugins)["watch"].error


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


def test_the_plugin_of_the_documentation_works(install: Install, repository: Path) -> None:
    text = (repository / "plugins" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    entry = re.search(r"\[project\.entry-points\.nexus_ext\]\n(\S+) = ", text)
    assert code is not None and entry is not None
    install(entry[1], code[1])
    plugins = Plugins(environ={})
    assert plugins.choose_io(INFO) == "direct"
    cli = click.Group()
    plugins.register_commands(cli)
    assert CliRunner().invoke(cli, ["io-policy"]).output == "always direct\n"


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


@dataclass(frozen=True)
class FakePlan:
    fingerprint: str


SOLVER = """
from nexus_ext import hookimpl
from nexus_ext.errors import DoesNotFit
class Solver:
    name = "theirs"
    def solve(self, catalog, hardware, request):
        return {expression}
    def refuse(self):
        raise DoesNotFit("too small", smallest_bytes=7)
@hookimpl
def nexus_placement_solver():
    return Solver()
"""


@pytest.fixture
def solve(install: Install, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Solve for the model "f1" with a plugin's solver, whose answer is the expression."""
    placement = ModuleType("nexus_ext.placement")
    placement.Plan = FakePlan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nexus_ext.placement", placement)

    def call(expression: str) -> object:
        install("theirs", SOLVER.format(expression=expression))
        catalog = SimpleNamespace(fingerprint="f1", plan=FakePlan("f1"), other=FakePlan("f2"))
        return Plugins(environ={}).solve(catalog, None, None)  # type: ignore[arg-type]

    return call


def test_a_plugin_places_a_model(solve: Callable[[str], object]) -> None:
    assert solve("catalog.plan") == FakePlan("f1")


def test_a_plugin_may_say_that_nothing_fits(solve: Callable[[str], object]) -> None:
    with pytest.raises(DoesNotFit, match="too small"):
        solve("self.refuse()")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "raised ZeroDivisionError"),
        ("None", "which is no Plan"),
        ("catalog.other", "planned for the model 'f2'"),
    ],
)
def test_a_plugin_that_places_badly_is_named(
    expression: str, reason: str, solve: Callable[[str], object]
) -> None:
    with pytest.raises(PluginError, match=f"plugin 'theirs' .*{reason}"):
        solve(expression)


@pytest.mark.parametrize(
    ("answer", "what"), [('"crystal ball"', "'crystal ball'"), ("3", "3"), ("1 // 0", "division")]
)
def test_a_predictor_that_answers_nonsense_is_named(
    install: Install, answer: str, what: str
) -> None:
    code = POLICY.replace("nexus_io_policy", "nexus_expert_predictor").replace("{mode!r}", answer)
    install("seer", code.format(name="seer"))
    with pytest.raises(PluginError, match="seer") as failure:
        Plugins(environ={}).choose_predictor(CacheInfo(2, 8, 2, 4))
    assert what in str(failure.value)


def test_a_plugin_may_choose_another_predictor(install: Install) -> None:
    code = POLICY.replace("nexus_io_policy", "nexus_expert_predictor")
    install("seer", code.format(name="seer", mode="none"))
    assert Plugins(environ={}).choose_predictor(CacheInfo(2, 8, 2, 4)) == "none"
