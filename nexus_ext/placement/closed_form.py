"""RAM or NVMe for each tensor, solved without a solver.

For each way to treat the experts and the embedding (few groups, so all counts can be tried), the
dense tensors are pinned by value density, the next smaller size filling the hole that a larger
one leaves. Both properties that users count on follow from that order, and are not checked after
the fact: the hole is smaller than any dense tensor that is still streamed, and more memory is
never predicted slower. (At the first tensor where two budgets decide differently, the smaller
one has less room left than that tensor takes, and nothing behind it has a higher density; so
what it can still save is less than what the tensor saves.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Final

from nexus_ext.placement.costs import token_seconds
from nexus_ext.placement.memory import PAGE
from nexus_ext.placement.problem import Group, Problem

MAX_COMBINATIONS: Final = 8192


@dataclass(frozen=True, slots=True)
class Choice:
    """How many tensors of each group are pinned, and what else follows."""

    dense: tuple[int, ...]  # per Problem.dense
    waited: tuple[int, ...]  # per Problem.waited
    ring_bytes: int
    scratch_bytes: int
    token_s: float
    read_s: float


def smallest_bytes(problem: Problem) -> int:
    """Return the smallest weights budget that `choose` finds a placement for."""
    dense = min(problem.ring.smallest, problem.dense_bytes)
    if problem.fixed_dense_bytes:
        dense = problem.ring.smallest
    return (
        problem.fixed_bytes
        + dense
        + min(weight + scratch for _, weight, scratch, _ in _combinations(problem))
    )


def choose(problem: Problem, budget_bytes: int) -> Choice | None:
    """Return the placement with the shortest token within `budget_bytes`; None if none fits."""
    best: Choice | None = None
    for counts, weight, scratch, waited_s in _combinations(problem):
        free = budget_bytes - problem.fixed_bytes - weight - scratch
        if best is not None and token_seconds(waited_s, 0.0, problem.compute) > best.token_s:
            continue
        filled = _fill(problem, free)
        if filled is None:
            continue
        dense, ring_bytes, ahead_s = filled
        token_s = token_seconds(waited_s, ahead_s, problem.compute)
        read_s = waited_s + ahead_s
        if best is None or (token_s, read_s) < (best.token_s, best.read_s):
            best = Choice(dense, counts, ring_bytes, scratch, token_s, read_s)
    return best


def complete(
    problem: Problem,
    budget_bytes: int,
    dense: tuple[int, ...],
    waited: tuple[int, ...],
    ring_bytes: int,
) -> Choice | None:
    """Return the choice that pins these counts, or None if they exceed the budget.

    Dense tensors that still fit beside a ring of `ring_bytes` are pinned as well: they cannot
    make a token slower, and read less.
    """
    scratch = problem.fixed_scratch
    waited_s = problem.fixed_waited_s
    used = problem.fixed_bytes
    for group, count in zip(problem.waited, waited, strict=True):
        left = len(group.tensors) - count
        used += count * group.weight
        waited_s += left * group.saved_s
        if left:
            scratch = max(scratch, group.scratch)
    used += sum(group.weight * n for group, n in zip(problem.dense, dense, strict=True))
    free = budget_bytes - used - scratch
    all_pinned = all(n == len(g.tensors) for g, n in zip(problem.dense, dense, strict=True))
    streams = bool(problem.fixed_dense_bytes) or not all_pinned
    room = free - (problem.ring.smallest if streams else 0)
    if room < 0:
        return None
    counts = []
    ahead_s = problem.fixed_ahead_s
    spare = max(0, free - max(ring_bytes, problem.ring.smallest)) if streams else 0
    for group, count in zip(problem.dense, dense, strict=True):
        more = min(len(group.tensors) - count, spare // group.weight)
        spare -= more * group.weight
        room -= more * group.weight
        counts.append(count + more)
        ahead_s += (len(group.tensors) - count - more) * group.saved_s
    if not streams:
        ring_bytes = 0
    else:
        ring_bytes = min(problem.ring.smallest + room, problem.ring.target) // PAGE * PAGE
    token_s = token_seconds(waited_s, ahead_s, problem.compute)
    return Choice(tuple(counts), waited, ring_bytes, scratch, token_s, waited_s + ahead_s)


def _fill(problem: Problem, free: int) -> tuple[tuple[int, ...], int, float] | None:
    """Return counts of pinned dense tensors, the ring, and the reading that is left."""
    missing = problem.dense_bytes - free
    if not problem.fixed_dense_bytes and missing <= 0:
        return tuple(len(group.tensors) for group in problem.dense), 0, problem.fixed_ahead_s
    # Tensors that the user has put on nvme justify a ring of their size as well.
    smallest_ring = problem.ring.of(free, max(missing, problem.fixed_dense_bytes))
    if smallest_ring is None:
        return None
    room = free - smallest_ring
    ahead_s = problem.fixed_ahead_s
    counts = []
    for group in problem.dense:
        count = min(len(group.tensors), room // group.weight)
        room -= count * group.weight
        ahead_s += (len(group.tensors) - count) * group.saved_s
        counts.append(count)
    # What no tensor fits into still makes the ring longer.
    ring_bytes = min(smallest_ring + room, problem.ring.target) // PAGE * PAGE
    return tuple(counts), ring_bytes, ahead_s


def _combinations(problem: Problem) -> Iterator[tuple[tuple[int, ...], int, int, float]]:
    """Yield (counts, bytes of RAM, scratch, reading) for ways to pin what is not read ahead."""
    groups = problem.waited
    sizes = [len(group.tensors) for group in groups]
    if prod(n + 1 for n in sizes) <= MAX_COMBINATIONS:
        ways: Iterator[tuple[int, ...]] = product(*(range(n, -1, -1) for n in sizes))
    else:
        ways = _chain(groups)
    for counts in ways:
        scratch = problem.fixed_scratch
        weight, seconds = 0, problem.fixed_waited_s
        for group, count in zip(groups, counts, strict=True):
            left = len(group.tensors) - count
            weight += count * group.weight
            seconds += left * group.saved_s
            if left:
                scratch = max(scratch, group.scratch)
        yield counts, weight, scratch, seconds


def _chain(groups: tuple[Group, ...]) -> Iterator[tuple[int, ...]]:
    """Yield counts that grow group by group, in the order of density and in its reverse."""
    sizes = [len(group.tensors) for group in groups]
    yield tuple(0 for _ in sizes)
    for order in (range(len(sizes)), range(len(sizes) - 1, -1, -1)):
        counts = [0] * len(sizes)
        for i in order:
            for _ in range(sizes[i]):
                counts[i] += 1
                yield tuple(counts)
