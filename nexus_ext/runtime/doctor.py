"""Everything that is known to go wrong, as checks with a sentence and a fix: `nexus doctor`.

One function a trap. A check looks and never changes anything that stays; one that cannot be made
counts as failed, with the reason. `warn` is for what costs speed or memory, `fail` for what makes
paged weights impossible. With a model, its file, its file system and its plan are looked at too.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from nexus_ext import core, kernels
from nexus_ext.errors import NexusError, UsageError
from nexus_ext.formats import open_model
from nexus_ext.hardware.cgroup import cpu_quota, memory_groups
from nexus_ext.hardware.memory import read_memory
from nexus_ext.hardware.mounts import MEMORY_FILESYSTEMS, mount_of, read_mounts
from nexus_ext.hardware.system import System
from nexus_ext.placement import PlanRequest
from nexus_ext.plugins import list_plugins, plugins
from nexus_ext.policies import IoInfo
from nexus_ext.runtime import SPIN_COUNT, backend, ggml, own_kernels
from nexus_ext.runtime.amx import amx_works
from nexus_ext.runtime.memory_limit import memory_group
from nexus_ext.runtime.planning import plan_model
from nexus_ext.units import GIB, KIB, MIB, format_bytes

_log = logging.getLogger("nexus_ext.doctor")

Status = Literal["ok", "warn", "fail"]

_BUSY_SHARE: Final = 0.15  # of all processors, by others: from here on it shows in tokens a second
_LITTLE_SPACE_BYTES: Final = GIB
_VIRTUAL_DISKS: Final = ("vd", "xvd")  # they call themselves rotational, whatever is behind them
# How libgomp reads GOMP_SPINCOUNT, and without it OMP_WAIT_POLICY; without both it takes the last.
_SPIN_SUFFIXES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SPIN_POLICIES: Final = {"active": 30 * 10**9, "passive": 0, "": 300_000}


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    sentence: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at."""

    model: str | None = None
    system: System = field(default_factory=System)
    busy_window_s: float = 0.3

    @property
    def path(self) -> str:
        """The model, or where one would probably be."""
        return self.model or os.getcwd()


def check_llama_cpp(subject: Subject) -> Check:
    """llama-cpp-python is there, and is one that the whole test suite has passed with."""
    name = "llama-cpp-python"
    installed, version = backend.llama_cpp_version(), ggml.version()
    if backend.TESTED_VERSIONS.get(installed) == version:
        return Check(name, "ok", f"llama-cpp-python {installed} with ggml {version}, tested")
    tested = ", ".join(backend.TESTED_VERSIONS)
    return Check(
        name,
        "warn",
        f"llama-cpp-python {installed} with ggml {version} is not among the tested versions",
        f"if anything fails: pip install llama-cpp-python=={tested.split(', ')[-1]}",
    )


def check_backend(subject: Subject) -> Check:
    """The backend passes its self-test, and the ggml that libllama uses has it."""
    backend.register()
    names = [device.name for device in ggml.devices()]
    if "NEXUS" in names:
        text = f"compared with this ggml and registered; libllama sees {', '.join(names)}"
        return Check("backend", "ok", text)
    return Check(
        "backend",
        "fail",
        f"the backend is registered in a ggml that libllama does not use (it sees {names})",
        "reinstall llama-cpp-python and nexus_ext in a clean environment",
    )


def check_one_ggml(subject: Subject) -> Check:
    """Only one copy of ggml is loaded: a second one has a registry of its own."""
    ggml.library()
    maps = subject.system.read("/proc/self/maps") or ""
    copies = sorted(set(re.findall(r"(/\S*/libggml-base\S*)", maps)))
    if len(copies) <= 1:
        return Check("copies of ggml", "ok", "one copy of ggml is loaded")
    return Check(
        "copies of ggml",
        "warn",
        f"{len(copies)} copies of ggml are loaded: {', '.join(copies)}",
        "do not load libraries of llama.cpp by path beside llama-cpp-python",
    )


def check_io_engine(subject: Subject) -> Check:
    """io_uring can be used; containers often forbid it."""
    with tempfile.NamedTemporaryFile(prefix="nexus-doctor-") as file:
        file.write(bytes(64 * KIB))
        file.flush()
        _, _, _, engine = core.read_disk(file.name, 4 * KIB, 4, False, 64 * KIB, 10**8)
    if engine == "io_uring":
        return Check("io_uring", "ok", "reads go through io_uring")
    return Check(
        "io_uring",
        "warn",
        "io_uring cannot be used here; reads go through threads, which cost processor time",
        "allow io_uring (sysctl kernel.io_uring_disabled=0, seccomp profile of the container)",
    )


def check_memory(subject: Subject) -> Check:
    """How much memory there is, and what limits it."""
    memory = read_memory(subject.system)
    text = f"{format_bytes(memory.available_bytes)} of {format_bytes(memory.total_bytes)} available"
    groups = memory_groups(subject.system)
    if groups:
        tightest = min(groups, key=lambda g: g.limit_bytes)
        text += f"; limited to {format_bytes(tightest.limit_bytes)} by {tightest.path}"
    if memory.available_bytes < 512 * MIB:
        return Check("memory", "warn", text, "end other programs, or raise the limit")
    return Check("memory", "ok", text)


def check_swap(subject: Subject) -> Check:
    """Memory that counts as resident may be swapped out when there is swap."""
    rows = (subject.system.read("/proc/swaps") or "").splitlines()[1:]
    if not rows:
        return Check("swap", "ok", "there is no swap: resident weights stay resident")
    return Check(
        "swap",
        "warn",
        f"{len(rows)} swap areas: under memory pressure resident weights may be swapped out",
        "keep --ram below what is available, or swapoff",
    )


def check_memlock(subject: Subject) -> Check:
    """Older kernels charge io_uring's rings to the limit of locked memory."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    old = version is not None and (int(version[1]), int(version[2])) < (5, 12)
    if old and soft != resource.RLIM_INFINITY and soft < 8 * MIB:
        return Check(
            "locked memory",
            "warn",
            f"the limit of locked memory is {text}, and this kernel charges io_uring to it",
            "raise it: ulimit -l 65536, or LimitMEMLOCK= of the service",
        )
    return Check("locked memory", "ok", f"limit of locked memory: {text}")


def check_memory_limit(subject: Subject) -> Check:
    """Whether `bench --limit` can work."""
    try:
        with memory_group(64 * MIB, subject.system) as group:
            return Check("memory cgroup", "ok", f"commands can be limited ({group.how})")
    except UsageError as error:
        return Check("memory cgroup", "warn", f"`bench --limit` cannot work: {error}", error.hint)


def check_huge_pages(subject: Subject) -> Check:
    """Transparent huge pages for everything make small allocations large."""
    text = subject.system.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else "not known"
    if mode == "always":
        return Check(
            "huge pages",
            "warn",
            "transparent huge pages are on for everything: processes take more than they ask for",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Check("huge pages", "ok", f"transparent huge pages: {mode}")


def check_openmp(subject: Subject) -> Check:
    """OpenMP's threads spin between regions, and take processors from reading and each other."""
    ggml.library()
    if "libgomp" not in (subject.system.read("/proc/self/maps") or ""):
        return Check("threads", "ok", "this llama.cpp does not use GNU OpenMP")
    count = spin_count(os.environ)
    if count <= SPIN_COUNT:
        own = ", nexus_ext's choice" if count == SPIN_COUNT else ""
        return Check("threads", "ok", f"OpenMP's threads spin for {count} turns at most{own}")
    return Check(
        "threads",
        "warn",
        f"OpenMP's threads spin for {count} turns while they wait: beside any other busy program "
        "decoding can become a hundred times slower",
        f"unset GOMP_SPINCOUNT and OMP_WAIT_POLICY, then nexus_ext chooses {SPIN_COUNT} turns",
    )


def spin_count(environ: Mapping[str, str]) -> int:
    """Return for how many turns GNU OpenMP's threads spin in this environment."""
    count = environ.get("GOMP_SPINCOUNT", "").strip().lower()
    if count in ("infinite", "infinity"):
        return _SPIN_POLICIES["active"]
    if match := re.fullmatch(r"(\d+)\s*([kmgt]?)", count):
        return int(match[1]) * _SPIN_SUFFIXES[match[2]]
    policy = environ.get("OMP_WAIT_POLICY", "").strip().lower()
    return _SPIN_POLICIES.get(policy, _SPIN_POLICIES[""])


def check_busy(subject: Subject) -> Check:
    """Other programs use the processors: every barrier then waits for the slowest thread."""
    before = _cpu_times(subject.system)
    time.sleep(subject.busy_window_s)
    after = _cpu_times(subject.system)
    if before is None or after is None:
        return Check("other programs", "ok", "the load of this system is not told")
    total = sum(after) - sum(before)
    idle = sum(after[3:5]) - sum(before[3:5])  # idle and waiting for disks
    share = 1 - idle / total if total > 0 else 0.0
    if share < _BUSY_SHARE:
        return Check("other programs", "ok", f"other programs use {share:.0%} of the processors")
    return Check(
        "other programs",
        "warn",
        f"other programs use {share:.0%} of the processors",
        "end them, or give fewer --threads than there are cores",
    )


def _cpu_times(system: System) -> list[int] | None:
    """Return the counters of the "cpu" line of /proc/stat: user, nice, system, idle, iowait, ..."""
    first = (system.read("/proc/stat") or "").partition("\n")[0].split()
    return [int(word) for word in first[1:9]] if first[:1] == ["cpu"] else None


def check_quota(subject: Subject) -> Check:
    """A quota of processor time stops all threads in the middle of a graph."""
    quota = cpu_quota(subject.system)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if quota is None or quota >= (cores or 1):
        return Check("processors", "ok", f"{cores} logical processors, no quota below that")
    return Check(
        "processors",
        "warn",
        f"a quota of {quota:g} processors is set, of {cores}",
        f"give --threads {max(1, int(quota))}",
    )


def check_amx(subject: Subject) -> Check:
    """Weights in AMX buffers crash some builds on some machines; tried in a child process."""
    if amx_works() is not False:
        return Check("AMX", "ok", "weights in AMX buffers work, or are not used here")
    return Check(
        "AMX",
        "warn",
        "this llama.cpp crashes with weights in its AMX buffers, which stock programs use; "
        "nexus_ext keeps weights in plain buffers",
        "outside of nexus_ext: use_extra_bufts=False, or a llama.cpp built with GGML_NATIVE=OFF or "
        "by GCC 11.5, 12.4, 13.3 or newer",
    )


def check_kernels(subject: Subject) -> Check:
    """Which of our kernels run here, and with which ternary types they give ggml's bits."""
    opencl = kernels.open_opencl()[1]
    same = [name for name in own_kernels.TYPES if own_kernels.same_bits(name)]
    text = f"{kernels.why()}; the same bits as ggml: {', '.join(same) or 'none'}; {opencl}"
    if kernels.current_isa() != "reference":
        return Check("ternary kernels", "ok", text)
    return Check("ternary kernels", "warn", text, "nothing: ggml computes, unless you ask for ours")


def check_batch_kernels(subject: Subject) -> Check:
    """Which products with many columns are computed by kernels of ours."""
    name = "many columns"
    if not backend.is_registered():
        return Check(name, "ok", "computed by llama.cpp: the backend is not loaded")
    types = ", ".join(backend.batch_kernels())
    if types:
        return Check(name, "ok", f"own kernels for {types}, with the bits of this llama.cpp")
    return Check(name, "ok", "computed by llama.cpp: own kernels need AVX2, and its bits")


def check_flash_attention(subject: Subject) -> Check:
    """`auto` means off while weights are paged."""
    return Check(
        "flash attention",
        "ok",
        "llama.cpp's flash attention `auto` means off while weights are paged; nexus_ext sets it "
        "explicitly, other programs need -fa on or -fa off",
    )


def check_gpus(subject: Subject) -> Check:
    """The GPUs that this llama.cpp can use."""
    gpus = ggml.gpus()
    if not gpus:
        return Check("GPUs", "ok", "this llama.cpp sees no GPU; everything is computed on the CPU")
    names = (f"{d.name} ({d.description}, {format_bytes(d.free_bytes)} free)" for d, _ in gpus)
    return Check("GPUs", "ok", ", ".join(names))


def check_plugins(subject: Subject) -> Check:
    """Every plugin that was found works."""
    records = list_plugins()
    bad = [r for r in records if r.error]
    if not bad:
        return Check("plugins", "ok", f"{len(records)} plugins work, built-ins included")
    return Check(
        "plugins",
        "warn",
        "; ".join(f"{r.name} ({r.distribution}): {r.error or r.state}" for r in bad),
        "uninstall or update them, or set NEXUS_LOAD_PLUGINS=none",
    )


def check_space(subject: Subject) -> Check:
    """`verify` and `probe` write temporary files."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    mount = mount_of(os.path.realpath(place), read_mounts(subject.system))
    text = f"{format_bytes(free)} free in {place}"
    if mount is not None and mount.filesystem in MEMORY_FILESYSTEMS:
        return Check(
            "temporary files",
            "warn",
            f"{text}, which is in memory",
            "set TMPDIR to a directory on a disk",
        )
    if free < _LITTLE_SPACE_BYTES:
        return Check("temporary files", "warn", text, "free some space, or set TMPDIR")
    return Check("temporary files", "ok", text)


# -- with a model ---------------------------------------------------------------------------------


def check_model(subject: Subject) -> Check:
    """The header can be read, and the files are as long as it says."""
    catalog = open_model(subject.path)
    text = f"{catalog.shape.architecture}, {format_bytes(catalog.nbytes)} of weights"
    return Check("model", "ok", f"{text} in {len(catalog.tensors)} tensors")


def check_direct(subject: Subject) -> Check:
    """Reads can go around the page cache, and give the same bytes."""
    found = core.direct_io(subject.path)
    if found.direct:
        return Check(
            "direct reads",
            "ok",
            f"the file system reads around the page cache, with the same bytes (aligned to "
            f"{found.offset_align})",
        )
    return Check(
        "direct reads",
        "warn",
        f"no direct reads of {subject.path}: {found.reason}; the page cache will be used",
        "put the model on a local file system such as ext4, xfs or btrfs",
    )


def check_file_system(subject: Subject) -> Check:
    """A model in memory or on spinning disks is not what paging is made for."""
    from nexus_ext.hardware.disk import is_rotational

    mount = mount_of(os.path.realpath(subject.path), read_mounts(subject.system))
    if mount is None:
        return Check("file system", "ok", "the file system is not told")
    text = f"{mount.filesystem} at {mount.mount_point}"
    if mount.filesystem in MEMORY_FILESYSTEMS:
        return Check(
            "file system",
            "warn",
            f"{text} lives in memory: streaming from it saves none",
            "put the model on a disk",
        )
    virtual = os.path.basename(mount.source).startswith(_VIRTUAL_DISKS)
    if is_rotational(subject.system, mount) and not virtual:
        return Check(
            "file system", "warn", f"{text} is on a spinning disk", "put the model on an SSD"
        )
    return Check("file system", "ok", text)


def check_io_policy(subject: Subject) -> Check:
    """What the policy would choose if all of this model were streamed."""
    nbytes = open_model(subject.path).nbytes
    memory = read_memory(subject.system)
    mode = plugins().choose_io(IoInfo(nbytes, 0, memory.available_bytes, memory.limit_bytes))
    why = "fits" if mode == "buffered" else "does not fit"
    return Check(
        "page cache",
        "ok",
        f"{format_bytes(nbytes)} of weights, {format_bytes(memory.available_bytes)} available: all "
        f"of it streamed {why} in the page cache, so reads would be {mode}",
    )


def check_plan(subject: Subject) -> Check:
    """The model can be placed on this machine."""
    planned = plan_model(subject.path, PlanRequest())
    plan = planned.plan
    if plan.everything_fits:
        return Check("plan", "ok", "everything fits: nothing is streamed without a smaller --ram")
    return Check(
        "plan",
        "ok",
        f"{format_bytes(plan.weights_bytes)} for weights, "
        f"{format_bytes(plan.streamed_bytes_per_token)} read per token, at most "
        f"{plan.prediction.bound_tok_s:.2f} tokens a second",
    )


CHECKS: Final[tuple[Callable[[Subject], Check], ...]] = (
    check_busy,  # first, before the others make work themselves
    check_llama_cpp,
    check_backend,
    check_one_ggml,
    check_openmp,
    check_quota,
    check_amx,
    check_kernels,
    check_batch_kernels,
    check_gpus,
    check_flash_attention,
    check_io_engine,
    check_memory,
    check_swap,
    check_memlock,
    check_memory_limit,
    check_huge_pages,
    check_space,
    check_plugins,
)
MODEL_CHECKS: Final[tuple[Callable[[Subject], Check], ...]] = (
    check_model,
    check_file_system,
    check_direct,
    check_io_policy,
    check_plan,
)


def run_checks(subject: Subject) -> list[Check]:
    """Return the outcome of every check that applies."""
    checks = CHECKS if subject.model is None else CHECKS + MODEL_CHECKS
    return [_guarded(check, subject) for check in checks]


def _guarded(check: Callable[[Subject], Check], subject: Subject) -> Check:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        return check(subject)
    except NexusError as error:
        return Check(name, "fail", str(error), error.hint)
    except Exception as error:  # one check that breaks must not hide what the others find
        _log.debug("check %s", name, exc_info=error)
        text = f"the check could not be made: {type(error).__name__}: {error}"
        return Check(name, "fail", text, "run with --debug and report it")
