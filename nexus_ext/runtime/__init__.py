"""llama.cpp with paged weights: planning, loading, running and checking a model.

Importing this package decides how the threads of llama.cpp wait (below); llama.cpp itself is
imported when `Llama` is first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_ext.runtime.llama import Llama as Llama
    from nexus_ext.runtime.llama import NexusHandle as NexusHandle
    from nexus_ext.runtime.planning import Planned as Planned
    from nexus_ext.runtime.planning import hardware_profile as hardware_profile
    from nexus_ext.runtime.planning import plan_model as plan_model
    from nexus_ext.runtime.stats import RunStats as RunStats

# GNU OpenMP's threads spin between two pieces of work, by default for about a millisecond. Next to
# any other busy process the spinning thread holds the core that the working one needs, and decoding
# falls a hundred times (tests/bench/spinning_threads.py). A thousand turns bridge the gaps inside a
# graph and cost nothing on an idle machine. It only counts before libgomp is loaded, hence here.
SPIN_COUNT = 1000
_chosen_here = "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ
if _chosen_here:
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def user_environ() -> dict[str, str]:
    """Return the environment as the user gave it: for programs that run as if without us."""
    environ = dict(os.environ)
    if _chosen_here and environ.get("GOMP_SPINCOUNT") == str(SPIN_COUNT):
        del environ["GOMP_SPINCOUNT"]
    return environ


_HOME = {
    "Llama": "llama",
    "NexusHandle": "llama",
    "Planned": "planning",
    "RunStats": "stats",
    "hardware_profile": "planning",
    "plan_model": "planning",
}

__all__ = [
    "Llama",
    "NexusHandle",
    "Planned",
    "RunStats",
    "hardware_profile",
    "plan_model",
    "user_environ",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"nexus_ext.runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value
