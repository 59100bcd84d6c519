"""What holds for tests of first-party plugins: as for others, and they need not be installed."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent
sys.path += [str(PLUGINS.parent), *map(str, sorted(PLUGINS.glob("*/src")))]

from tests.conftest import _own_cache, _working_directory, repository  # noqa: E402, F401
