"""The processor: its name, the cores that this process may use, and the instruction sets.

Knows which sets exist, not which of them a kernel uses or how fast it then is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping

from nexus_ext.hardware.cgroup import cpu_quota
from nexus_ext.hardware.profile import Cpu
from nexus_ext.hardware.system import System

# The kernel's names of instruction sets -> ours, in the order in which a profile lists them.
_X86 = {
    "ssse3": "ssse3", "sse4_2": "sse4_2", "avx": "avx", "f16c": "f16c", "fma": "fma",
    "bmi2": "bmi2", "avx2": "avx2", "avx_vnni": "avx_vnni", "avx512f": "avx512f",
    "avx512bw": "avx512bw", "avx512vl": "avx512vl", "avx512vbmi": "avx512_vbmi",
    "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16", "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16",
}  # fmt: skip
_ARM = {
    "asimd": "neon", "neon": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm",
    "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme",
}  # fmt: skip
_DARWIN = {
    "hw.optional.avx2_0": "avx2", "hw.optional.avx512f": "avx512f",
    "hw.optional.AdvSIMD": "neon", "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_FP16": "fp16", "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm", "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
}  # fmt: skip


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Return (name, instruction sets) of /proc/cpuinfo; the name is "" where it has none."""
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            first.setdefault(key.strip(), value.strip())
    flags = set(first.get("flags", "").split())
    features = set(first.get("Features", "").split())
    found = [ours for theirs, ours in _X86.items() if theirs in flags]
    found += [ours for theirs, ours in _ARM.items() if theirs in features]
    name = first.get("model name") or first.get("Hardware") or first.get("Model") or ""
    return name, tuple(dict.fromkeys(found))


def parse_cpu_list(text: str) -> frozenset[int]:
    """Return the CPUs of a kernel list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def count_cores(siblings: Mapping[int, str], allowed: Iterable[int]) -> int:
    """Return the number of physical cores that `allowed` CPUs belong to.

    `siblings` maps a CPU to the list of CPUs on its core, as the kernel writes it; a CPU that it
    does not hold counts as a core of its own.
    """
    return len({parse_cpu_list(siblings.get(cpu, "")) or frozenset({cpu}) for cpu in allowed})


def allowed_cpus() -> frozenset[int]:
    """Return the CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_siblings(system: System, cpus: Iterable[int]) -> dict[int, str]:
    """Return for each of `cpus` the list of CPUs on its core, as the kernel writes it, or ""."""
    siblings = {}
    for cpu in cpus:
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        text = system.read(f"{topology}/core_cpus_list")
        # The older name of the same list.
        text = system.read(f"{topology}/thread_siblings_list") if text is None else text
        siblings[cpu] = text or ""
    return siblings


def darwin_cpu(values: Mapping[str, str]) -> Cpu:
    """Return the processor that macOS's sysctl values describe."""
    found = [ours for name, ours in _DARWIN.items() if values.get(name) == "1"]
    n_threads = _integer(values.get("hw.logicalcpu")) or os.cpu_count() or 1
    performance = _integer(values.get("hw.perflevel0.physicalcpu"))
    return Cpu(
        n_cores=_integer(values.get("hw.physicalcpu")) or n_threads,
        n_threads=n_threads,
        isa=tuple(dict.fromkeys(found)),
        name=values.get("machdep.cpu.brand_string", platform.machine()),
        n_performance_cores=performance or None,
    )


def read_cpu(system: System, allowed: frozenset[int] | None = None) -> Cpu:
    """Return the processor as this process may use it."""
    if system.is_darwin:
        return darwin_cpu(system.sysctl())
    allowed = allowed_cpus() if allowed is None else allowed
    name, isa = parse_cpuinfo(system.read("/proc/cpuinfo") or "")
    siblings = read_siblings(system, allowed)
    # Hybrid Intel processors list their performance cores here; elsewhere the file is absent.
    fast = allowed & parse_cpu_list(system.read("/sys/devices/cpu_core/cpus") or "")
    return Cpu(
        n_cores=count_cores(siblings, allowed),
        n_threads=len(allowed),
        isa=isa,
        name=name or platform.machine(),
        n_performance_cores=count_cores(siblings, fast) or None,
        quota_cpus=cpu_quota(system),
    )


def _integer(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
