"""Which type each tensor gets, so that a model of a given size loses as little as possible.

Every tensor has a menu of types, each with a size and an estimated loss; losses are taken to add
up, as the divergence does to first order for small errors. Choosing one entry of each menu within a
budget is the multiple-choice knapsack problem. `allocate` solves it as a mixed-integer program,
`relaxed` by its Lagrangian on the convex hull of each menu: that is optimal for the size that it
reaches, and at most one step of a tensor below the budget.

The idea of ranking all matrices of a model in one list is MixLLM's (Zheng et al., 2024, section
3.1), at the granularity that GGUF has: one type a tensor.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ext.errors import UsageError


@dataclass(frozen=True, slots=True)
class Choice:
    """One entry of a menu."""

    type_name: str
    nbytes: int
    loss: float  # estimated, in the unit of all the others


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor and its menu."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """One type for each tensor."""

    types: Mapping[str, str]
    nbytes: int
    loss: float


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Return what is no larger than anything that loses less, smallest first."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if not best or choice.loss < best[-1].loss:
            best.append(choice)
    return best


def useful(choices: Sequence[Choice]) -> list[Choice]:
    """Return the lower convex hull of (bytes, loss): smallest first, each step paying less a byte.

    What is larger and no better than another, or above the line between two others, is left out.
    """
    best: list[Choice] = []
    for choice in frontier(choices):
        while len(best) > 1 and _gain(best[-2], best[-1]) <= _gain(best[-2], choice):
            best.pop()
        best.append(choice)
    return best


def _gain(small: Choice, large: Choice) -> float:
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def smallest_nbytes(items: Sequence[Item]) -> int:
    return sum(min(c.nbytes for c in item.choices) for item in items)


def _check(items: Sequence[Item], budget_nbytes: int) -> None:
    least = smallest_nbytes(items)
    if least > budget_nbytes:
        raise UsageError(
            f"the smallest types take {least} bytes, and {budget_nbytes} are allowed",
            hint="allow more bits per weight, or smaller types",
        )


def _result(items: Sequence[Item], picked: Sequence[Choice]) -> Allocation:
    return Allocation(
        types={item.name: c.type_name for item, c in zip(items, picked, strict=True)},
        nbytes=sum(c.nbytes for c in picked),
        loss=sum(c.loss for c in picked),
    )


def relaxed(items: Sequence[Item], budget_nbytes: int) -> Allocation:
    """Take steps along the hulls, the one that pays most a byte first, while they fit.

    Raises UsageError when even the smallest types do not.
    """
    _check(items, budget_nbytes)
    hulls = [useful(item.choices) for item in items]
    at = [0] * len(items)
    room = budget_nbytes - sum(hull[0].nbytes for hull in hulls)
    steps = [(-_gain(h[0], h[1]), i) for i, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(steps)
    while steps:
        _, i = heapq.heappop(steps)
        hull = hulls[i]
        cost = hull[at[i] + 1].nbytes - hull[at[i]].nbytes
        if cost > room:
            continue  # a later, smaller step of another tensor may still fit
        room -= cost
        at[i] += 1
        if at[i] + 1 < len(hull):
            heapq.heappush(steps, (-_gain(hull[at[i]], hull[at[i] + 1]), i))
    return _result(items, [hull[k] for hull, k in zip(hulls, at, strict=True)])


def allocate(items: Sequence[Item], budget_nbytes: int) -> Allocation:
    """Return the allocation with the least loss within the budget, to a relative gap of 1e-6.

    Raises UsageError when even the smallest types do not fit.
    """
    import highspy  # 50 ms to import

    _check(items, budget_nbytes)
    start = relaxed(items, budget_nbytes)
    # HiGHS's tolerances are absolute: losses in units that make the answer about 1000.
    scale = 1000 / start.loss if start.loss > 0 else 1.0
    create: Any = highspy.Highs
    highs = create()
    for option, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", 1e-6)):
        highs.setOptionValue(option, value)
    variables = [[highs.addIntegral(0, 1) for _ in item.choices] for item in items]
    for row in variables:
        highs.addConstr(highs.qsum(row) == 1)
    mib = 1 / (1 << 20)
    pairs = [
        (c, v)
        for item, row in zip(items, variables, strict=True)
        for c, v in zip(item.choices, row, strict=True)
    ]
    highs.addConstr(highs.qsum(c.nbytes * mib * v for c, v in pairs) <= budget_nbytes * mib)
    highs.minimize(highs.qsum(c.loss * scale * v for c, v in pairs))
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return start
    picked = [
        max(zip(row, item.choices, strict=True), key=lambda vc: float(highs.val(vc[0])))[1]
        for item, row in zip(items, variables, strict=True)
    ]
    found = _result(items, picked)
    # Tolerances may let the sum pass the budget by a byte or two; the relaxed answer never does.
    return found if found.nbytes <= budget_nbytes and found.loss <= start.loss else start


def checked(answer: object, items: Sequence[Item], budget_nbytes: int) -> Allocation:
    """Return somebody else's allocation with its sums counted anew.

    Raises ValueError, whose text says what is wrong with it.
    """
    if not isinstance(answer, Allocation):
        raise ValueError(f"returned a {type(answer).__name__}, which is no Allocation")
    picked = []
    for item in items:
        name = answer.types.get(item.name)
        choice = next((c for c in item.choices if c.type_name == name), None)
        if choice is None:
            known = ", ".join(c.type_name for c in item.choices)
            raise ValueError(f"gives {item.name} a type that is none of {known}")
        picked.append(choice)
    if len(answer.types) != len(items):
        raise ValueError(f"gives types to {len(answer.types)} tensors, there are {len(items)}")
    found = _result(items, picked)
    if found.nbytes > budget_nbytes:
        raise ValueError(f"takes {found.nbytes} bytes, {budget_nbytes} are allowed")
    return found
