"""llama.cpp with paged weights: planning, loading, running and checking a model."""

from __future__ import annotations

from nexus_ext.runtime.llama import Llama, NexusHandle
from nexus_ext.runtime.planning import Planned, hardware_profile, plan_model
from nexus_ext.runtime.stats import RunStats

__all__ = ["Llama", "NexusHandle", "Planned", "RunStats", "hardware_profile", "plan_model"]
