"""First-party plugins from the checkout, for benchmarks that do not have them installed."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


def add_plugins() -> None:
    """Put the sources of all first-party plugins on sys.path, behind what is installed."""
    sys.path += [str(source) for source in sorted(PLUGINS.glob("*/src"))]
