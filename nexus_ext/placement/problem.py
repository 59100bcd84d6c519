"""The placement problem in numbers: what each tensor costs and saves, grouped by equal cost.

Tensors of one role and one size are interchangeable, so the solvers decide how many of each
group are pinned and never which; `spread` then distributes them over the depth of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nexus_ext.errors import UsageError
from nexus_ext.placement import costs, ring
from nexus_ext.placement.costs import PAGED, Compute, Rates
from nexus_ext.placement.memory import PAGE
from nexus_ext.placement.plan import GPU, HOST, NVME, RAM, TIERS, Pin
from nexus_ext.types import Catalog, TensorInfo

PIN_SLACK: Final = 2 * PAGE  # a pinned tensor is read in place, whatever its alignment
HOST_SLACK: Final = PAGE  # a small tensor lies across the edges of pages it does not fill


def resident_bytes(tensor: TensorInfo, tier: str) -> int:
    """Return the main memory that `tensor` takes when it is pinned, or on the host."""
    return tensor.nbytes + (PIN_SLACK if tier == RAM else HOST_SLACK)


def match_pins(catalog: Catalog, pins: Sequence[Pin]) -> dict[str, tuple[str, Pin]]:
    """Return the tier and the pin of each tensor that a pin names. UsageError for unusable pins."""
    compiled = []
    for pin in pins:
        try:
            compiled.append((re.compile(pin.pattern), pin))
        except re.error as error:
            raise UsageError(
                f"pin {pin.pattern!r} is no regular expression: {error}",
                hint="Write a pin as PATTERN=TIER, for instance 'ffn_down=nvme'.",
            ) from error
        if pin.tier not in TIERS:
            raise UsageError(
                f"pin {pin.pattern!r} names the tier {pin.tier!r}, which does not exist",
                hint=f"Use one of {', '.join(TIERS)}.",
            )
    for pattern, pin in compiled:
        if not any(pattern.search(tensor.name) for tensor in catalog.tensors):
            raise UsageError(
                f"pin {pin.pattern!r} is found in none of the {len(catalog.tensors)} names",
                hint="`nexus inspect MODEL --tensors` lists the names of tensors.",
            )
    pinned: dict[str, tuple[str, Pin]] = {}
    for tensor in catalog.tensors:
        for pattern, pin in compiled:
            if not pattern.search(tensor.name):
                continue
            tier = pin.tier
            if tensor.role not in PAGED and tier in (RAM, NVME):
                if tier == NVME:
                    raise UsageError(
                        f"pin {pin.pattern!r} puts {tensor.name} ({tensor.role.value}) on nvme, "
                        "but such tensors are always resident",
                        hint="Narrow the pattern to matrices, for instance 'ffn_.*_exps'.",
                    )
                tier = HOST
            pinned[tensor.name] = (tier, pin)
            break
    return pinned


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that cost and save the same."""

    tensors: tuple[TensorInfo, ...]  # by layer
    weight: int  # bytes of RAM to pin one
    saved_s: float  # reading per token that pinning one saves
    scratch: int  # scratch area that streaming any of them needs; 0 for dense ones

    @property
    def density(self) -> float:
        return self.saved_s / self.weight


@dataclass(frozen=True, slots=True)
class Problem:
    """Which tensors are to be split over RAM and NVMe, and what the others cost already."""

    dense: tuple[Group, ...]  # read ahead through the ring; highest density first
    waited: tuple[Group, ...]  # experts and embedding rows; highest density first
    fixed: Mapping[str, str]  # tensors whose tier is settled
    fixed_bytes: int  # RAM of the settled ones
    fixed_ahead_s: float  # reading of the settled ones that are streamed
    fixed_waited_s: float
    fixed_dense_bytes: int  # bytes of the settled ones that pass through the ring
    fixed_scratch: int
    compute: Compute  # wherever the weights come from
    ring: ring.RingSize

    @property
    def dense_bytes(self) -> int:
        return sum(group.weight * len(group.tensors) for group in self.dense)


def problem_of(
    catalog: Catalog,
    rates: Rates,
    n_ubatch: int,
    pinned: Mapping[str, tuple[str, Pin]],
    on_gpu: frozenset[str] = frozenset(),
) -> Problem:
    """Return the problem that is left when the tensors `on_gpu` are on the GPU."""
    shape = catalog.shape
    free: dict[tuple[object, ...], list[TensorInfo]] = {}
    fixed: dict[str, str] = {}
    fixed_bytes = fixed_dense = fixed_scratch = 0
    ahead_s = waited_s = 0.0
    compute = Compute()
    streamable = []
    for tensor in catalog.tensors:
        if tensor.name in on_gpu:
            fixed[tensor.name] = GPU
            used = costs.token_bytes(tensor, shape)
            compute = compute.plus(tensor, used / rates.gpu_bytes_s)
            continue
        row_only = tensor.tied_output and bool(on_gpu)
        used = costs.token_bytes(tensor, shape, row_only=row_only)
        compute = compute.plus(tensor, used / rates.cpu_bytes_s)
        if row_only:
            compute = compute.plus(tensor, tensor.nbytes / rates.gpu_bytes_s)
        ring_user = costs.is_dense(tensor) and not row_only
        default = None if tensor.role in PAGED else HOST
        tier = pinned[tensor.name][0] if tensor.name in pinned else default
        if ring_user and tier in (None, NVME):
            streamable.append(tensor)
        if tier is None:
            record = 0 if ring_user else costs.record_bytes(tensor)
            alike = (ring_user, tensor.role, tensor.nbytes, record)
            free.setdefault(alike, []).append(tensor)
            continue
        fixed[tensor.name] = tier
        if tier != NVME:
            fixed_bytes += resident_bytes(tensor, tier)
            continue
        seconds = costs.read_s(tensor, shape, rates, row_only=row_only)
        fixed_scratch = max(fixed_scratch, ring.scratch_bytes(tensor, n_ubatch, row_only=row_only))
        if ring_user:
            ahead_s += seconds
            fixed_dense += tensor.nbytes
        else:
            waited_s += seconds
    groups: dict[bool, list[Group]] = {True: [], False: []}
    for key, tensors in free.items():
        one = tensors[0]
        row_only = one.tied_output and bool(on_gpu)
        groups[bool(key[0])].append(
            Group(
                tensors=tuple(sorted(tensors, key=lambda t: -1 if t.layer is None else t.layer)),
                weight=resident_bytes(one, RAM),
                saved_s=costs.read_s(one, shape, rates, row_only=row_only),
                scratch=ring.scratch_bytes(one, n_ubatch, row_only=row_only),
            )
        )
    return Problem(
        dense=_by_density(groups[True]),
        waited=_by_density(groups[False]),
        fixed=fixed,
        fixed_bytes=fixed_bytes,
        fixed_ahead_s=ahead_s,
        fixed_waited_s=waited_s,
        fixed_dense_bytes=fixed_dense,
        fixed_scratch=fixed_scratch,
        compute=compute,
        ring=ring.ring_size(streamable, rates.disk_bytes_s),
    )


def _by_density(groups: Iterable[Group]) -> tuple[Group, ...]:
    return tuple(sorted(groups, key=lambda g: (-g.density, -g.weight, g.tensors[0].name)))


def spread(tensors: Sequence[TensorInfo], n_pinned: int) -> list[TensorInfo]:
    """Return `n_pinned` of `tensors`, evenly distributed over their order (Bresenham).

    So reading and computing alternate over the whole depth of the model; a pinned prefix would
    leave the disk idle there and the processor idle behind it.
    """
    n = len(tensors)
    half = n // 2  # begin in the middle of a step: neither end is favoured
    return [
        tensor
        for i, tensor in enumerate(tensors)
        if ((i + 1) * n_pinned + half) // n > (i * n_pinned + half) // n
    ]
