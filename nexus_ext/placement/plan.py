"""What is asked of the solver and what it answers, as plain values with a JSON form.

Nothing is decided here; `solver.solve` makes plans and `describe.describe` tells about them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from typing import Any, Final

from nexus_ext.errors import FormatError

VERSION: Final = 1
GPU: Final = "gpu"  # llama.cpp's own GPU buffers
RAM: Final = "ram"  # read once at load, pinned in our memory
NVME: Final = "nvme"  # read at each use
HOST: Final = "host"  # llama.cpp's own CPU buffers, always resident
TIERS: Final = (GPU, RAM, NVME, HOST)
IO_MODES: Final = ("auto", "direct", "buffered")
ROWS: Final = (
    "host weights",
    "pinned weights",
    "ring",
    "scratch",
    "expert cache",
    "residuals",
    "KV cache",
    "compute buffers",
    "runtime",
    "GPU (shared memory)",
    "free",
)


@dataclass(frozen=True, slots=True)
class Pin:
    """Tensors whose name `pattern` (a regular expression) is found in go to `tier`, whatever."""

    pattern: str
    tier: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user wants. The defaults are those of llama-cpp-python."""

    ram_bytes: int | None = None  # for all of the process; None: 80 % of what is available
    weights_bytes: int | None = None  # for weights, pools and residuals alone
    n_ctx: int = 512  # 0: as trained
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq_max: int = 1
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attn: bool = False
    pins: tuple[Pin, ...] = ()  # the first that matches a tensor wins
    gpu_bytes: int | None = None  # None: the GPU's working set; 0: do not use a GPU
    io_mode: str = "auto"
    n_threads: int = 0  # 0: one a core
    n_outputs_max: int = 0  # rows of logits in a graph; 0: n_batch, as llama.cpp has it
    logits_all: bool = False
    kv_unified: bool = False  # all sequences share one KV cache
    residual_bytes: int = 0  # of a residual correction, in memory beside the weights


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for. None: no such limit was given."""

    ram_bytes: int | None
    weights_bytes: int | None
    gpu_bytes: int  # 0 when no GPU is used


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the solver expects of decoding and of prefill; see `costs` for the model behind it."""

    read_s: float  # reading, per decoded token
    compute_s: float  # computing, per decoded token
    token_s: float
    tok_s: float
    bound_tok_s: float  # disk bandwidth / streamed bytes; inf when nothing is streamed
    prefill_read_s: float  # reading, per micro-batch: each streamed weight once
    prefill_compute_s: float  # computing, per micro-batch
    prefill_tok_s: float


@dataclass(frozen=True, slots=True)
class ExpertCache:
    """Slots for the experts of one layer. A slot holds one expert of each of `tensors`."""

    tensors: tuple[str, ...]  # all on nvme, in the order in which a layer computes with them
    slots: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each tensor of one model goes, and what that costs."""

    fingerprint: str  # Catalog.fingerprint of the model
    tiers: Mapping[str, str]  # tensor name -> one of TIERS
    ring_bytes: int
    slab_bytes: int
    scratch_bytes: int
    io_mode: str
    budget: Budget
    # Bytes by purpose, in the order of ROWS. They sum to budget.ram_bytes, or without a RAM
    # budget to the RAM that budget.weights_bytes leads to.
    breakdown: Mapping[str, int]
    gpu_breakdown: Mapping[str, int]  # weights, KV cache, compute buffers, free; empty without
    n_gpu_layers: int  # for llama.cpp: the output and the last layers; 0 without a GPU
    streamed_bytes_per_token: int  # decode, expected
    prediction: Prediction
    everything_fits: bool  # nothing is streamed
    notes: tuple[str, ...] = ()  # sentences that the user should see
    expert_caches: tuple[ExpertCache, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """Bytes that count against a weights budget."""
        return sum(self.breakdown[row] for row in ROWS[:6])

    @property
    def ram_bytes(self) -> int:
        """Bytes of main memory that the process will use, what is free left out."""
        return sum(n_bytes for row, n_bytes in self.breakdown.items() if row != "free")

    def to_json(self) -> str:
        """Return the plan as JSON text that `from_json` reads back to an equal plan."""
        data = asdict(self)
        bound = self.prediction.bound_tok_s
        data["prediction"]["bound_tok_s"] = bound if math.isfinite(bound) else None
        return json.dumps({"version": VERSION, **data}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> Plan:
        """Return the plan in `text`. FormatError names `source` and what is wrong with it."""
        return _Reader(source).plan(text)


class _Reader:
    """Reads one JSON text and refuses all that `to_json` would not have written."""

    def __init__(self, source: str) -> None:
        self._source = source

    def plan(self, text: str) -> Plan:
        try:
            data = json.loads(text, parse_constant=self._constant)
        except (ValueError, RecursionError) as error:
            raise self._error("is not JSON", str(error)) from error
        fields = self._object("plan", data)
        version = fields.pop("version", None)
        if version != VERSION or isinstance(version, bool):
            raise self._error("version", f"is {version!r}, not {VERSION}")
        self._names("plan", fields, Plan)
        plan = Plan(
            fingerprint=self._text(fields, "fingerprint"),
            tiers=self._tiers(fields["tiers"]),
            ring_bytes=self._count(fields, "ring_bytes"),
            slab_bytes=self._count(fields, "slab_bytes"),
            scratch_bytes=self._count(fields, "scratch_bytes"),
            io_mode=self._text(fields, "io_mode"),
            budget=self._budget(fields["budget"]),
            breakdown=self._counts("breakdown", fields["breakdown"]),
            gpu_breakdown=self._counts("gpu_breakdown", fields["gpu_breakdown"]),
            n_gpu_layers=self._count(fields, "n_gpu_layers"),
            streamed_bytes_per_token=self._count(fields, "streamed_bytes_per_token"),
            prediction=self._prediction(fields["prediction"]),
            everything_fits=self._flag(fields, "everything_fits"),
            notes=self._texts(fields, "notes"),
            expert_caches=self._caches(fields["expert_caches"]),
        )
        self._consistent(plan)
        return plan

    def _consistent(self, plan: Plan) -> None:
        if plan.io_mode not in IO_MODES:
            raise self._error("io_mode", f"is {plan.io_mode!r}, not one of {', '.join(IO_MODES)}")
        if tuple(plan.breakdown) != ROWS:
            raise self._error("breakdown", f"has the rows {list(plan.breakdown)}, not {list(ROWS)}")
        streamed = NVME in plan.tiers.values()
        if plan.everything_fits == streamed:
            raise self._error("everything_fits", f"is {plan.everything_fits}, the tiers disagree")
        for name in ("ring", "scratch"):
            if plan.breakdown[name] != getattr(plan, f"{name}_bytes"):
                raise self._error(f"{name}_bytes", "differs from the breakdown")
        if plan.breakdown["expert cache"] != sum(c.nbytes for c in plan.expert_caches):
            raise self._error("expert_caches", "differ from the breakdown")
        for cache in plan.expert_caches:
            for name in cache.tensors:
                if plan.tiers.get(name) != NVME:
                    raise self._error("expert_caches", f"hold {name!r}, which is not on {NVME}")
        ram, weights = plan.budget.ram_bytes, plan.budget.weights_bytes
        if ram is not None and sum(plan.breakdown.values()) != ram:
            raise self._error("breakdown", f"does not sum to the budget of {ram} bytes")
        if weights is not None and plan.weights_bytes > weights:
            raise self._error("breakdown", f"exceeds the weights budget of {weights} bytes")
        gpu = sum(plan.gpu_breakdown.values())
        if gpu > plan.budget.gpu_bytes:
            raise self._error("gpu_breakdown", f"exceeds the {plan.budget.gpu_bytes} bytes allowed")

    def _tiers(self, value: object) -> dict[str, str]:
        tiers: dict[str, str] = {}
        for name, tier in self._object("tiers", value).items():
            if tier not in TIERS:
                raise self._error(f"tiers[{name!r}]", f"is {tier!r}, not one of {', '.join(TIERS)}")
            tiers[name] = tier
        return tiers

    def _caches(self, value: object) -> tuple[ExpertCache, ...]:
        if not isinstance(value, list):
            raise self._error("expert_caches", f"is {value!r}, not a list")
        caches = []
        for entry in value:
            fields = self._object("expert_caches", entry)
            self._names("expert_caches", fields, ExpertCache)
            slots, nbytes = self._count(fields, "slots"), self._count(fields, "nbytes")
            caches.append(ExpertCache(self._texts(fields, "tensors"), slots, nbytes))
        return tuple(caches)

    def _budget(self, value: object) -> Budget:
        fields = self._object("budget", value)
        self._names("budget", fields, Budget)
        ram = None if fields["ram_bytes"] is None else self._count(fields, "ram_bytes")
        weights = None if fields["weights_bytes"] is None else self._count(fields, "weights_bytes")
        return Budget(ram, weights, self._count(fields, "gpu_bytes"))

    def _prediction(self, value: object) -> Prediction:
        fields = self._object("prediction", value)
        self._names("prediction", fields, Prediction)
        if fields["bound_tok_s"] is None:
            fields["bound_tok_s"] = math.inf
        numbers = {}
        for name, number in fields.items():
            wrong = isinstance(number, bool) or not isinstance(number, (int, float))
            if wrong or math.isnan(number) or number < 0:
                raise self._error(f"prediction.{name}", f"is {number!r}, not a rate or a time")
            numbers[name] = float(number)
        return Prediction(**numbers)

    def _names(self, what: str, fields: dict[str, Any], kind: type) -> None:
        known = {field.name for field in fields_of(kind)}
        for name in sorted(known.symmetric_difference(fields)):
            raise self._error(f"{what}.{name}", "is missing" if name in known else "is not known")

    def _object(self, what: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(what, f"is {type(value).__name__}, not an object")
        return dict(value)

    def _counts(self, what: str, value: object) -> dict[str, int]:
        fields = self._object(what, value)
        return {name: self._count(fields, name) for name in fields}

    def _count(self, fields: dict[str, Any], name: str) -> int:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._error(name, f"is {value!r}, not a number of bytes or things")
        return value

    def _text(self, fields: dict[str, Any], name: str) -> str:
        value = fields[name]
        if not isinstance(value, str):
            raise self._error(name, f"is {value!r}, not text")
        return value

    def _texts(self, fields: dict[str, Any], name: str) -> tuple[str, ...]:
        value = fields[name]
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._error(name, f"is {value!r}, not a list of texts")
        return tuple(value)

    def _flag(self, fields: dict[str, Any], name: str) -> bool:
        value = fields[name]
        if not isinstance(value, bool):
            raise self._error(name, f"is {value!r}, not true or false")
        return value

    def _constant(self, name: str) -> float:
        raise ValueError(f"{name} is not a number")

    def _error(self, what: str, why: str) -> FormatError:
        return FormatError(f"{self._source}: {what} {why}", hint="Make the plan again.")
