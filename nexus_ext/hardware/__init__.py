"""What the machine can do: processor, memory and its limits, GPUs, and the disk of a path.

`probe` measures this machine; `load_profile` reads the profile of any machine from a file. Both
give a `HardwareProfile`, plain values for the solver. What is done with them is not known here.
"""

from __future__ import annotations

from nexus_ext.hardware.disk import DirectIO, DiskReader
from nexus_ext.hardware.memory import available_bytes, process_peak_bytes
from nexus_ext.hardware.probe import MemoryBandwidth, example_profiles, load_profile, probe
from nexus_ext.hardware.profile import Cpu, Disk, DiskPoint, Gpu, HardwareProfile, Memory

__all__ = [
    "Cpu",
    "DirectIO",
    "Disk",
    "DiskPoint",
    "DiskReader",
    "Gpu",
    "HardwareProfile",
    "Memory",
    "MemoryBandwidth",
    "available_bytes",
    "example_profiles",
    "load_profile",
    "probe",
    "process_peak_bytes",
]
