"""Which processor each thread of a computation is bound to.

Knows cores and their hardware threads as Linux lists them; binds nothing itself.
"""

from __future__ import annotations

from nexus_ext.errors import UsageError
from nexus_ext.hardware.cpu import allowed_cpus, parse_cpu_list, read_siblings
from nexus_ext.hardware.system import System


def pin_order(system: System, allowed: frozenset[int]) -> tuple[int, ...]:
    """Return the `allowed` processors in the order in which threads take them.

    First one of each physical core, then second hardware threads of the same cores, and so on.
    Performance cores of hybrid processors come before the others. A processor whose core is not
    told counts as a core of its own.
    """
    fast = parse_cpu_list(system.read("/sys/devices/cpu_core/cpus") or "")
    cores: dict[frozenset[int], list[int]] = {}
    for cpu, text in sorted(read_siblings(system, allowed).items()):
        cores.setdefault(parse_cpu_list(text) or frozenset({cpu}), []).append(cpu)
    ranked = sorted(
        (place, bool(fast) and cpu not in fast, cpu)
        for cpus in cores.values()
        for place, cpu in enumerate(cpus)
    )
    return tuple(cpu for _, _, cpu in ranked)


def pinned_cpus(
    n_threads: int, system: System | None = None, allowed: frozenset[int] | None = None
) -> tuple[int, ...]:
    """Return the processors of `n_threads` threads, one each.

    `allowed` is what this process may use (its affinity mask, which a cpuset narrows). UsageError
    when there are more threads than that: two of them on one processor would take turns.
    """
    system = System() if system is None else system
    allowed = allowed_cpus() if allowed is None else allowed
    order = pin_order(system, allowed)
    if n_threads > len(order):
        raise UsageError(
            f"{n_threads} threads cannot be pinned: this process may use {len(order)} processors",
            hint=f"use at most {len(order)} threads (n_threads and n_threads_batch), or do not pin",
        )
    return order[:n_threads]
