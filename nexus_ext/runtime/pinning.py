"""Threads of a model's computations on physical cores of their own: `pin_cores`."""

from __future__ import annotations

import logging

from nexus_ext import core
from nexus_ext.hardware.pinning import pinned_cpus
from nexus_ext.hardware.system import System

_log = logging.getLogger("nexus_ext.runtime")

NO_EFFECT = "pin_cores has no effect: {} lets no program choose the cores of its threads"


def pin_threads(model: core.Model, n_threads: int, system: System | None = None) -> str:
    """Bind the threads of this model's graphs, one to a processor; return a sentence about it.

    Cores come before second threads of cores, within what this process may use. On a system that
    does not bind threads nothing is done, and the sentence says so. UsageError when there are more
    threads than processors.
    """
    system = System() if system is None else system
    if system.platform != "linux":
        sentence = NO_EFFECT.format("macOS" if system.is_darwin else system.platform)
        _log.warning(sentence)
        return sentence
    cpus = pinned_cpus(n_threads, system)
    model.set_cores(cpus)
    return f"{n_threads} threads are bound to processors {', '.join(map(str, cpus))}"
