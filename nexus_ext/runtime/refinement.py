"""An allocation of types, improved where it stands.

Sensitivities are measured with one tensor quantized and all others exact. At few bits that
misleads: errors of different tensors meet in a model that is far from its original, and do not
add up. So the model is quantized as it was allocated, and each tensor is taken one step up and one
step down from there; the choice is made again among these steps by what they were measured to
change. What comes out is measured too, and kept only if it diverges less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nexus_ext.errors import UsageError
from nexus_ext.quality.allocation import Allocation, Choice, Item, allocate, frontier
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime.allocation import Measured
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.quantize import type_named
from nexus_ext.runtime.reference import ReferenceFile
from nexus_ext.runtime.sensitivity import ModelCopy, Tick, probe_groups
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import TensorInfo

ROUNDS: Final = 2
# Steps that are worth less together than alone: each try trusts what they gain less.
_DOUBTS: Final = (1.0, 1.5, 3.0)
_MAX_PROBES: Final = 64  # groups of tensors that take steps


class _Standing:
    """The copy with the types of an allocation, and how far it is from the original."""

    def __init__(
        self,
        copy: ModelCopy,
        reference: ReferenceFile,
        tensors: Mapping[str, TensorInfo],
        imatrix: ImportanceMatrix,
        start: Allocation,
    ) -> None:
        self._copy, self._reference, self._imatrix = copy, reference, imatrix
        self._tensors = tensors
        self.types: dict[str, str] = {}
        self.move(start.types)
        self.divergence = self.measured()

    def move(self, types: Mapping[str, str]) -> None:
        for name, kind in types.items():
            if self.types.get(name) != kind:
                self._copy.write(self._tensors[name], type_named(kind), self._imatrix)
                self.types[name] = kind

    def measured(self) -> float:
        return float(scores_against(self._copy.llm, self._reference).kl.mean())

    def change(self, types: Mapping[str, str]) -> float:
        """Return what these types would add to the divergence; they are taken back."""
        before = {name: self.types[name] for name in types}
        self.move(types)
        try:
            return self.measured() - self.divergence
        finally:
            self.move(before)


def refine(
    weights: Weights,
    known: Measured,
    start: Allocation,
    budget_nbytes: int,
    imatrix: ImportanceMatrix,
    text: bytes,
    *,
    n_ctx: int = 512,
    most: int = 8,
    rounds: int = ROUNDS,
    n_threads: int = 0,
    scratch_dir: str | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Allocation:
    """Return an allocation within `budget_nbytes` that diverges no more than `start`, measured.

    `loss` of the result is its divergence in nats on the `most` first windows of `text`. Needs a
    copy of the model in `scratch_dir`. Raises UsageError for a split model.
    """
    if len(weights.catalog.files) != 1:
        raise UsageError(
            f"{weights.catalog.files[0].path} is split into {len(weights.catalog.files)} files",
            hint="merge them with llama-gguf-split --merge, or pass --sensitivity error",
        )
    menus = {item.name: item for item in known.items()}
    groups = probe_groups(known.tensors, _MAX_PROBES)
    with ModelCopy(weights, scratch_dir, n_ctx, n_threads) as copy:
        with record_reference(
            copy.llm, text, n_ctx=n_ctx, most=most, scratch_dir=scratch_dir
        ) as reference:
            tensors = {t.name: t for t in known.tensors}
            standing = _Standing(copy, reference, tensors, imatrix, start)
            for number in range(rounds):
                done = number * len(groups)

                def measuring(n: int, done: int = done) -> None:
                    tick("steps", done + n, rounds * len(groups))

                steps = _steps(standing, menus, groups, measuring)
                if not _taken(standing, steps, budget_nbytes):
                    break
            nbytes = sum(_choice(menus[n], kind).nbytes for n, kind in standing.types.items())
            return Allocation(dict(standing.types), nbytes, standing.divergence)


def _choice(item: Item, kind: str) -> Choice:
    return next(c for c in item.choices if c.type_name == kind)


def _neighbours(item: Item, kind: str) -> list[str]:
    """Return the next smaller and the next larger type that is worth its bytes."""
    there = _choice(item, kind)
    worth = [c for c in frontier(item.choices) if c.type_name != kind]
    below = [c for c in worth if c.nbytes < there.nbytes]
    above = [c for c in worth if c.nbytes > there.nbytes]
    return [c.type_name for c in (*below[-1:], *above[:1])]


def _steps(
    standing: _Standing,
    menus: Mapping[str, Item],
    groups: Sequence[Sequence[TensorInfo]],
    measuring: Callable[[int], None],
) -> list[Item]:
    """Return menus of the types that are there, at a loss of 0, and of one step from them.

    Members of a group step together if they have one type, and share the change by their bytes.
    """
    items = []
    for number, group in enumerate(groups):
        measuring(number)
        by_type: dict[str, list[str]] = {}
        for tensor in group:
            by_type.setdefault(standing.types[tensor.name], []).append(tensor.name)
        for kind, names in by_type.items():
            changes = {kind: 0.0}
            for other in _neighbours(menus[names[0]], kind):
                changes[other] = standing.change(dict.fromkeys(names, other))
            total = sum(_choice(menus[name], kind).nbytes for name in names)
            for name in names:
                part = _choice(menus[name], kind).nbytes / total
                items.append(
                    Item(
                        name,
                        tuple(
                            Choice(other, _choice(menus[name], other).nbytes, part * change)
                            for other, change in changes.items()
                        ),
                    )
                )
    return items


def _taken(standing: _Standing, steps: Sequence[Item], budget_nbytes: int) -> bool:
    """Take the steps that are worth most together; return whether the model is nearer for it."""
    for doubt in _DOUBTS:
        found = allocate([_doubted(item, doubt) for item in steps], budget_nbytes)
        moved = {n: kind for n, kind in found.types.items() if standing.types[n] != kind}
        if not moved:
            return False
        before = {name: standing.types[name] for name in moved}
        standing.move(moved)
        divergence = standing.measured()
        if divergence < standing.divergence:
            standing.divergence = divergence
            return True
        standing.move(before)
    return False


def _doubted(item: Item, doubt: float) -> Item:
    """Return the menu with gains divided and losses multiplied by `doubt`, and none below 0."""
    seen = [c.loss * doubt if c.loss > 0 else c.loss / doubt for c in item.choices]
    least = min(seen)
    return Item(
        item.name,
        tuple(
            Choice(c.type_name, c.nbytes, loss - least)
            for c, loss in zip(item.choices, seen, strict=True)
        ),
    )
