"""A plan in rows that a command line can print; no printing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_ext.placement.plan import TIERS, Plan
from nexus_ext.types import Catalog


@dataclass(frozen=True, slots=True)
class RoleRow:
    """Bytes of the weights of one role in each tier."""

    role: str
    tier_bytes: Mapping[str, int]  # every tier, in the order of TIERS

    @property
    def total_bytes(self) -> int:
        return sum(self.tier_bytes.values())


@dataclass(frozen=True, slots=True)
class Description:
    """What a user wants to know of a plan."""

    memory: tuple[tuple[str, int], ...]  # what for, bytes; rows of zero bytes are left out
    gpu: tuple[tuple[str, int], ...]
    roles: tuple[RoleRow, ...]  # by size, the largest first
    totals: RoleRow
    n_tensors: Mapping[str, int]  # tier -> tensors
    streamed_bytes_per_token: int
    read_s: float
    compute_s: float
    tok_s: float
    bound_tok_s: float
    prefill_tok_s: float
    limit: str  # "disk" or "compute": what a token waits for
    notes: tuple[str, ...]


def describe(plan: Plan, catalog: Catalog) -> Description:
    """Return the rows that tell about `plan`, a plan for the model of `catalog`."""
    roles: dict[str, dict[str, int]] = {}
    totals, n_tensors = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)
    for tensor in catalog.tensors:
        tier = plan.tiers[tensor.name]
        row = roles.setdefault(tensor.role.value, dict.fromkeys(TIERS, 0))
        row[tier] += tensor.nbytes
        totals[tier] += tensor.nbytes
        n_tensors[tier] += 1
    rows = [RoleRow(role, tiers) for role, tiers in roles.items()]
    notes = list(plan.notes)
    if plan.everything_fits:
        notes.append(
            "Everything fits: nothing is streamed, and stock llama.cpp runs the model (ternary "
            "weights apart, see `nexus run --kernels`)."
        )
    prediction = plan.prediction
    return Description(
        memory=tuple((name, size) for name, size in plan.breakdown.items() if size),
        gpu=tuple(plan.gpu_breakdown.items()),
        roles=tuple(sorted(rows, key=lambda row: (-row.total_bytes, row.role))),
        totals=RoleRow("all", totals),
        n_tensors=n_tensors,
        streamed_bytes_per_token=plan.streamed_bytes_per_token,
        read_s=prediction.read_s,
        compute_s=prediction.compute_s,
        tok_s=prediction.tok_s,
        bound_tok_s=prediction.bound_tok_s,
        prefill_tok_s=prediction.prefill_tok_s,
        limit="disk" if prediction.read_s > prediction.compute_s else "compute",
        notes=tuple(notes),
    )
