"""Where nexus_plugin.h is, for plugins that are written in C."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def get_include() -> str:
    """Return the directory to compile a plugin with: the only header in it is nexus_plugin.h."""
    # Beside the compiled modules, which an editable installation keeps apart from the sources.
    found = find_spec("nexus_ext._native")
    if found is None or found.origin is None:
        raise ImportError("nexus_ext is not installed: its compiled modules are missing")
    return str(Path(found.origin).parent / "include")
