"""What holds for every test: it sees the installed package, and a working directory of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the checkout first on sys.path. The `nexus_ext` there is source: it has
# neither its binaries nor `nexus_ext.formats`, and it would hide the installed one. The checkout
# goes last, which is enough to find `tests`.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT] + [str(ROOT)]

# As nexus_ext.runtime does, but in time for tests that import llama_cpp before it: libgomp reads it
# when it is loaded. Threads that spin make the tests many times slower beside anything else.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("nexus", deadline=None)
settings.load_profile("nexus")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of this machine goes into a cache of the tests, not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NEXUS_CACHE_DIR", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the checkout: `python -c` and `python -m` look into the working directory first."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, for tests of its files."""
    return ROOT
