"""A placement that asks the solver of nexus_ext, with one wish of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nexus_ext.hooks import DoesNotFit, Pin, solve

if TYPE_CHECKING:
    from nexus_ext.hooks import Catalog, HardwareProfile, Plan, PlanRequest


class HeadInMemory:
    """Keep the output matrix in memory, where the budget allows it.

    A solver may also build its `Plan` from nothing; most ideas are a `Pin` for the one there is.
    """

    name = "template-head-in-memory"

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        pin = Pin(r"^output\.weight$", "ram")
        if not any(tensor.name == "output.weight" for tensor in catalog.tensors):
            return solve(catalog, hardware, request)  # the token embedding serves as one
        try:
            # What the user pins comes first: the first pin that matches a tensor wins.
            return solve(catalog, hardware, replace(request, pins=(*request.pins, pin)))
        except DoesNotFit:
            return solve(catalog, hardware, request)
