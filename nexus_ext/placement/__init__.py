"""Where the bytes of a model go: GPU, RAM or NVMe. Pure functions of data."""

from __future__ import annotations

from nexus_ext.placement.describe import Description, RoleRow, describe
from nexus_ext.placement.plan import Budget, Pin, Plan, PlanRequest, Prediction
from nexus_ext.placement.solver import solve

__all__ = [
    "Budget",
    "Description",
    "Pin",
    "Plan",
    "PlanRequest",
    "Prediction",
    "RoleRow",
    "describe",
    "solve",
]
