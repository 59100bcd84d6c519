"""The pytest plugin, in a pytest of its own: fixtures, and which plugins are under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
from nexus_ext import hookimpl
class Policy:
    name = "{name}"
    def choose(self, info):
        return "{mode}"
@hookimpl
def nexus_io_policy():
    return Policy()
"""
TEST = """
import pytest
def test_io(nexus_engine, nexus_plugins):
    from nexus_ext import plugins
    assert plugins.plugins() is nexus_plugins
    assert nexus_engine.io_mode(streamed_bytes={streamed}) == "{mode}"
def test_others_are_not_loaded(nexus_plugins):
    names = [r.name for r in nexus_plugins.list_plugins() if r.distribution != "nexus_ext"]
    assert names == {names}
"""
POLICY = PLUGIN.format(name="own", mode="direct")

COMMAND = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-q"]


class Project:
    """A directory with tests, and plugins installed beside it."""

    def __init__(self, directory: Path) -> None:
        self.tests, self.site = directory / "project", directory / "site"
        self.tests.mkdir()
        self.site.mkdir()

    def install(self, name: str, code: str) -> None:
        module = f"plugin_{name}"
        (self.site / f"{module}.py").write_text(code, encoding="utf-8")
        info = self.site / f"dist_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nexus_ext]\n{name} = {module}\n")

    def write(self, file: str, text: str) -> None:
        (self.tests / file).write_text(text, encoding="utf-8")

    def run(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*COMMAND, *arguments, "."],
            cwd=self.tests,
            env={**os.environ, "PYTHONPATH": str(self.site), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def run_with_fixtures(self) -> str:
        status, out = self.run("-p", "nexus_ext.testing.pytest_plugin")
        assert status == 0, out
        return out


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.install("own", POLICY)
    project.install("other", PLUGIN.format(name="other", mode="buffered"))
    return project


def test_it_is_an_entry_point_of_pytest() -> None:
    from importlib.metadata import entry_points

    (entry,) = (e for e in entry_points(group="pytest11") if e.name == "nexus_ext")
    assert entry.value == "nexus_ext.testing.pytest_plugin"


def test_the_plugins_of_the_project_are_under_test(project: Project) -> None:
    project.write("pyproject.toml", '[project.entry-points.nexus_ext]\nown = "plugin_own"\n')
    project.write("test_it.py", TEST.format(streamed=1, mode="direct", names=["own"]))
    assert "2 passed" in project.run_with_fixtures()


def test_of_several_projects_the_nearest_is_meant(project: Project) -> None:
    project.write("pyproject.toml", '[project.entry-points.nexus_ext]\nother = "plugin_other"\n')
    (project.tests / "inner" / "tests").mkdir(parents=True)
    project.write("inner/pyproject.toml", '[project.entry-points.nexus_ext]\nown = "plugin_own"\n')
    code = TEST.format(streamed=1, mode="direct", names=["own"])
    project.write("inner/tests/test_it.py", code)
    assert "2 passed" in project.run_with_fixtures()


def test_an_option_names_others(project: Project) -> None:
    project.write(
        "pyproject.toml",
        '[project.entry-points.nexus_ext]\nown = "plugin_own"\n'
        '[tool.pytest.ini_options]\nnexus_plugins = ["other"]\n',
    )
    huge = 1 << 50
    project.write("test_it.py", TEST.format(streamed=huge, mode="buffered", names=["other"]))
    assert "2 passed" in project.run_with_fixtures()


def test_a_marker_names_those_of_one_test(project: Project) -> None:
    project.write("pyproject.toml", '[tool.pytest.ini_options]\nnexus_plugins = ["other"]\n')
    project.write(
        "test_it.py",
        "import pytest, plugin_own\n"
        '@pytest.mark.nexus_plugins("own")\n'
        "def test_by_name(nexus_plugins):\n"
        '    assert nexus_plugins.io_policy().name == "own"\n'
        "@pytest.mark.nexus_plugins(plugin_own)\n"
        "def test_as_a_module(nexus_plugins):\n"
        '    assert nexus_plugins.io_policy().name == "own"\n'
        "@pytest.mark.nexus_plugins()\n"
        "def test_none(nexus_plugins):\n"
        '    assert nexus_plugins.io_policy().name == "fits-page-cache"\n',
    )
    assert "3 passed" in project.run_with_fixtures()


def test_a_project_that_names_no_plugin_is_told_how(project: Project) -> None:
    project.write("test_it.py", "def test_it(nexus_plugins): pass\n")
    status, out = project.run("-p", "nexus_ext.testing.pytest_plugin")
    assert status != 0
    assert "which plugins are under test?" in out and "@pytest.mark.nexus_plugins(...)" in out


def test_the_fixtures_are_what_they_are_said_to_be(project: Project) -> None:
    project.write("pyproject.toml", '[project.entry-points.nexus_ext]\nown = "plugin_own"\n')
    project.write(
        "test_it.py",
        "from nexus_ext import open_gguf\n"
        "def test_models(tiny_dense, tiny_moe):\n"
        "    dense, moe = open_gguf(str(tiny_dense)), open_gguf(str(tiny_moe))\n"
        "    assert (dense.shape.n_layers, dense.shape.n_experts) == (3, 0)\n"
        "    assert (moe.shape.n_layers, moe.shape.n_experts) == (4, 16)\n"
        "    assert max(tiny_dense.stat().st_size, tiny_moe.stat().st_size) < 3_000_000\n"
        "def test_trace(routing_trace):\n"
        "    assert routing_trace.n_tokens > 100\n",
    )
    assert "2 passed" in project.run_with_fixtures()


def test_a_session_without_the_fixtures_loads_none_of_it(project: Project) -> None:
    project.write(
        "test_it.py",
        "import sys\n"
        "def test_it():\n"
        '    assert not {"numpy", "llama_cpp", "click"} & set(sys.modules)\n'
        '    assert "nexus_ext.plugins" not in sys.modules\n',
    )
    assert "1 passed" in project.run_with_fixtures()
