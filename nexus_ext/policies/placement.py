"""The built-in placement: the solver of `nexus_ext.placement`, behind the hook that others use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import PlacementSolver

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import HardwareProfile
    from nexus_ext.placement import Plan, PlanRequest
    from nexus_ext.types import Catalog


class OptimalPlacement:
    """Minimize the expected time of a token within the budget."""

    name = "optimal"

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        from nexus_ext.placement import solve  # loads the solver, so only when it is asked

        return solve(catalog, hardware, request)


@hookimpl
def nexus_placement_solver() -> PlacementSolver:
    return OptimalPlacement()
