"""A placement that asks the solver of nexus_ext, with wishes of the user's in addition."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nexus_ext.hooks import DoesNotFit, Pin, solve

if TYPE_CHECKING:
    from nexus_ext.hooks import Catalog, HardwareProfile, Plan, PlanRequest

VARIABLE = "NEXUS_TEMPLATE_KEEP"


class KeepByName:
    """Keep tensors in memory whose names match $NEXUS_TEMPLATE_KEEP, where the budget allows it.

    A solver may also build its `Plan` from nothing; most ideas are a `Pin` for the one there is. It
    is hard to beat: what is kept by force pushes out what would have been worth more.
    """

    name = "template-keep-by-name"

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        pattern = os.environ.get(VARIABLE)
        if not pattern:
            return solve(catalog, hardware, request)
        # What the user pins comes first: the first pin that matches a tensor wins.
        pinned = replace(request, pins=(*request.pins, Pin(pattern, "ram")))
        try:
            return solve(catalog, hardware, pinned)
        except DoesNotFit:
            return solve(catalog, hardware, request)
