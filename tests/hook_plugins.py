"""Plugins for tests: distributions on sys.path as an installer lays them out, without one."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from nexus_ext.plugin_registry import GROUP
from nexus_ext.plugins import asking

Install = Callable[..., str]
"""(entry point, code, *, distribution, version) -> the name of the module"""


def _of_others(*, group: str) -> list[EntryPoint]:
    found = entry_points(group=group)
    return [e for e in found if not (e.dist and e.dist.name.startswith("nexus-"))]


def installer(folder: Path, patch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a distribution with one plugin into `folder`.

    First-party plugins that are installed are not found in this process from now on: they would
    compete with the plugins of a test.
    """
    folder.mkdir(exist_ok=True)
    patch.syspath_prepend(str(folder))
    patch.setattr(asking, "entry_points", _of_others)

    def add(name: str, code: str, *, distribution: str = "", version: str = "1.2") -> str:
        distribution = distribution or f"dist-{name}"
        module = re.sub(r"\W", "_", f"plugin_{distribution}_{name}")
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
        patch.delitem(sys.modules, module, raising=False)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}\n", encoding="utf-8")
        importlib.invalidate_caches()
        return module

    return add
