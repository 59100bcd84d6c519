"""First-party plugins use what third parties can use: public modules, and public names of them."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
PUBLIC = {
    *("nexus_ext", "nexus_ext.codecs", "nexus_ext.errors", "nexus_ext.formats", "nexus_ext.hooks"),
    *("nexus_ext.hardware", "nexus_ext.placement", "nexus_ext.plugins", "nexus_ext.policies"),
    *("nexus_ext.routing", "nexus_ext.testing", "nexus_ext.types"),
}


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Every name of nexus_ext that a file imports, as (module, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nexus_ext":
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nexus_ext":
            for alias in node.names:
                yield node.module or "", alias.name


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugins_import_public_names_only(plugin: Path) -> None:
    wrong = []
    for path in sorted(plugin.rglob("*.py")):
        for module, name in imported(path):
            where = f"{path.relative_to(ROOT)}: {module}.{name}"
            if module not in PUBLIC or not name or name.startswith("_"):
                wrong.append(f"{where} is not public")
            elif not hasattr(importlib.import_module(module), name):
                wrong.append(f"{where} does not exist")
    assert not wrong


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugins_are_distributions_of_their_own(plugin: Path) -> None:
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == plugin.name
    assert any(need.split("[")[0].split(">")[0] == "nexus_ext" for need in project["dependencies"])
    assert project["entry-points"].keys() == {"nexus_ext"}
    assert (plugin / project["readme"]).is_file()
    assert list(plugin.glob("tests/test_*.py"))


def test_there_are_plugins() -> None:
    assert PLUGINS
