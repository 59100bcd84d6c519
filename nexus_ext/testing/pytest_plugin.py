"""Fixtures for tests of plugins; pytest finds them when nexus_ext is installed.

    nexus_plugins   the plugins under test, loaded and in use: no others, whatever is installed
    nexus_engine    a FakeEngine with them
    tiny_dense      the path of a dense model of 3 layers, 1.7 MB
    tiny_moe        the path of a mixture of 16 experts in 4 layers, 2.6 MB
    routing_trace   a recorded RoutingTrace

Which plugins are under test is said by `@pytest.mark.nexus_plugins("entry-point", module, ...)` on
a test, else by `nexus_plugins = ["entry-point"]` under `[tool.pytest.ini_options]`, else they are
the entry points of the group nexus_ext in the nearest pyproject.toml above the test that has any.
`-p no:nexus_ext` switches all of this off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from nexus_ext.plugins import Plugins
    from nexus_ext.routing import RoutingTrace
    from nexus_ext.testing import FakeEngine

NAME = "nexus_plugins"  # of the marker, the ini option and the fixture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(NAME, "entry points of the nexus_ext plugins under test", type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{NAME}(*plugins): the nexus_ext plugins under test")


@pytest.fixture
def nexus_plugins(request: pytest.FixtureRequest) -> Iterator[Plugins]:
    """The plugins under test, in use until the test ends."""
    from nexus_ext.testing import load_plugins, use_plugins

    with use_plugins(load_plugins(*wanted_plugins(request))) as plugins:
        yield plugins


@pytest.fixture
def nexus_engine(nexus_plugins: Plugins) -> FakeEngine:
    """A FakeEngine with the plugins under test, on a described machine."""
    from nexus_ext.testing import FakeEngine

    return FakeEngine(nexus_plugins)


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense llama with random weights."""
    from nexus_ext.testing import write_llama

    path = tmp_path_factory.mktemp("tiny") / "dense.gguf"
    write_llama(path, n_layers=3, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=320)
    return path


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with random weights, of which a token uses 2 of 16."""
    from nexus_ext.testing import MoeDims, write_moe

    path = tmp_path_factory.mktemp("tiny") / "moe.gguf"
    write_moe(path, dims=MoeDims(n_layers=4, n_experts=16, n_used=2))
    return path


@pytest.fixture(scope="session")
def routing_trace() -> RoutingTrace:
    """What the routers of a trained model decided over a text."""
    from nexus_ext.testing import recorded_trace

    return recorded_trace()


def wanted_plugins(request: pytest.FixtureRequest) -> tuple[object, ...]:
    """Return what `load_plugins` is to load for a test."""
    marker = request.node.get_closest_marker(NAME)
    if marker is not None:
        return tuple(marker.args)
    if named := request.config.getini(NAME):
        return tuple(named)
    for folder in request.path.parents:
        if own := own_entry_points(folder / "pyproject.toml"):
            return tuple(own)
    raise pytest.UsageError(
        f"which plugins are under test? No pyproject.toml above {request.path} has an entry point "
        f"of the group nexus_ext; set {NAME} in [tool.pytest.ini_options], or mark the test: "
        f"@pytest.mark.{NAME}(...)"
    )


def own_entry_points(pyproject: Path) -> list[str]:
    """Return the names of the plugins that a project declares; none without such a file."""
    if not pyproject.is_file():
        return []
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    return sorted(project.get("project", {}).get("entry-points", {}).get("nexus_ext", {}))
