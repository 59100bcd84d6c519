"""Options that several commands share, and what they become.

Parsing only: nothing is opened here. Sizes and pins are checked where they are given, so that a
mistake is reported before any model is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from nexus_ext.cli.output import Output
from nexus_ext.errors import UsageError
from nexus_ext.units import parse_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile
    from nexus_ext.placement import Pin, PlanRequest
    from nexus_ext.types import Catalog

DEFAULT_CTX: Final = 4096  # tokens, or what the model was trained with if that is less
_TIERS: Final = ("gpu", "ram", "nvme", "host")
_KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # generic for the checker, not in every click that runs
else:
    ParamType = click.ParamType


class Size(ParamType):
    """A size in bytes, as people write it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        return parse_bytes(value, what=param.opts[-1] if param is not None else "the size")


class PinType(ParamType):
    """REGEX=TIER: tensors whose name the expression is found in stay in that memory."""

    name = "regex=tier"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, _, tier = value.rpartition("=")
        if not pattern or tier not in _TIERS:
            raise UsageError(
                f"--pin is {value!r}, which is not an expression, '=' and a tier",
                hint=f'write for instance --pin "ffn_down=ram"; tiers are {", ".join(_TIERS)}',
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"--pin is {value!r}, whose regular expression is wrong: {error}",
                hint="a dot matches any character, '\\.' a dot",
            ) from error
        return pattern, tier


class Finite(click.FloatRange):
    """A range of numbers; "nan" and "inf" are not in it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is no finite number.", param, ctx)
        return number


SIZE: Final = Size()
PIN: Final = PinType()


def output_options(function: Function) -> Function:
    """Add --json, --quiet and --debug; the command gets an `Output` as `output`."""

    @click.option("--json", "as_json", is_flag=True, help="Write one JSON document to stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="Write the answer and errors only.")
    @click.option("--debug", is_flag=True, help="Log everything; show tracebacks.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, quiet: bool, debug: bool, **kwargs: Any) -> Any:
        output = Output("json" if as_json else "quiet" if quiet else "human", debug=debug)
        return function(*args, output=output, **kwargs)

    return command  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line says about memory and reading."""

    ram_bytes: int | None
    weights_bytes: int | None
    gpu_bytes: int | None
    pins: tuple[tuple[str, str], ...]
    io_mode: str
    hardware_file: str | None
    n_ctx: int | None
    n_batch: int
    n_ubatch: int
    n_threads: int
    kv_type_k: str
    kv_type_v: str
    flash_attn: bool

    def context_tokens(self, catalog: Catalog) -> int:
        """Return the context to ask for: the one given, else a usual one that the model has."""
        trained = catalog.shape.n_ctx_train or DEFAULT_CTX
        if self.n_ctx is None:
            return min(DEFAULT_CTX, trained)
        return self.n_ctx or trained

    def request(self, catalog: Catalog) -> PlanRequest:
        """Return the request to the solver for this model."""
        from nexus_ext.placement import Pin, PlanRequest

        n_ctx = self.context_tokens(catalog)
        n_batch = min(n_ctx, self.n_batch)
        pins: tuple[Pin, ...] = tuple(Pin(pattern, tier) for pattern, tier in self.pins)
        return PlanRequest(
            ram_bytes=self.ram_bytes,
            weights_bytes=self.weights_bytes,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=min(n_batch, self.n_ubatch),
            kv_type_k=self.kv_type_k,
            kv_type_v=self.kv_type_v,
            flash_attn=self.flash_attn,
            pins=pins,
            gpu_bytes=self.gpu_bytes,
            io_mode=self.io_mode,
            n_threads=self.n_threads,
        )

    def check_plan_file(self, plan_file: str | None) -> None:
        """Raise UsageError when an option would decide what the plan in a file has decided."""
        if plan_file is None:
            return
        given = {
            "--ram": self.ram_bytes is not None,
            "--weights": self.weights_bytes is not None,
            "--gpu-mem": self.gpu_bytes is not None,
            "--pin": bool(self.pins),
            "--io": self.io_mode != "auto",
        }
        named = [name for name, is_given in given.items() if is_given]
        if named:
            raise UsageError(
                f"{' and '.join(named)} would change the plan of --plan, which is used as it is",
                hint="leave one of them out, or make another plan with `nexus plan`",
            )

    def hardware(self, path: str) -> HardwareProfile:
        """Return the machine to plan for: this one, measured, or the one of --hardware."""
        from nexus_ext.runtime import hardware_profile

        return hardware_profile(path, file=self.hardware_file)


_PLAN_OPTIONS: Final = (
    click.option("--ram", "ram_bytes", type=SIZE, metavar="SIZE", help="Budget for everything."),
    click.option(
        "--weights",
        "weights_bytes",
        type=SIZE,
        metavar="SIZE",
        help="Budget for weights and their pools alone.",
    ),
    click.option(
        "--gpu-mem",
        "gpu_bytes",
        type=SIZE,
        metavar="SIZE",
        help="GPU memory to use; 0 for none.  [default: what the GPU has]",
    ),
    click.option(
        "--pin",
        "pins",
        type=PIN,
        multiple=True,
        metavar="REGEX=TIER",
        help=f"Keep these tensors in {', '.join(_TIERS)}. Can be repeated; the first match wins.",
    ),
    click.option(
        "--io",
        "io_mode",
        type=click.Choice(["auto", "direct", "buffered"]),
        default="auto",
        help="Read past the page cache, through it, or as fits.  [default: auto]",
    ),
    click.option(
        "--hardware",
        "hardware_file",
        metavar="FILE",
        help="Plan for the machine in this file (`nexus probe -o`) instead of this one.",
    ),
    click.option(
        "-c",
        "--ctx",
        "--ctx-size",
        "n_ctx",
        type=click.IntRange(min=0),
        metavar="N",
        help=f"Tokens of context; 0: as trained.  [default: {DEFAULT_CTX}, or as trained if less]",
    ),
    click.option(
        "-b",
        "--batch",
        "--batch-size",
        "n_batch",
        type=click.IntRange(min=1),
        default=512,
        metavar="N",
        help="Tokens of a prompt that are handed over at once.  [default: 512]",
    ),
    click.option(
        "-ub",
        "--ubatch",
        "--ubatch-size",
        "n_ubatch",
        type=click.IntRange(min=1),
        default=512,
        metavar="N",
        help="Tokens that are computed at once: weights are read once for them.  [default: 512]",
    ),
    click.option(
        "-t",
        "--threads",
        "n_threads",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Threads that compute.  [default: one a core]",
    ),
    click.option(
        "-ctk",
        "--kv-type-k",
        "--cache-type-k",
        "kv_type_k",
        type=click.Choice(_KV_TYPES),
        default="f16",
        help="Type of the keys in the KV cache.  [default: f16]",
    ),
    click.option(
        "-ctv",
        "--kv-type-v",
        "--cache-type-v",
        "kv_type_v",
        type=click.Choice(_KV_TYPES),
        default="f16",
        help="Type of the values in the KV cache.  [default: f16]",
    ),
    click.option("-fa", "--flash-attn", "flash_attn", is_flag=True, help="Use flash attention."),
)


def plan_options(function: Function) -> Function:
    """Add the options about memory and reading; the command gets `PlanOptions` as `planning`."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        names = PlanOptions.__slots__
        planning = PlanOptions(**{name: kwargs.pop(name) for name in names})
        return function(*args, planning=planning, **kwargs)

    wrapped: Any = command
    for option in reversed(_PLAN_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def save(path: str, text: str, what: str) -> None:
    """Write a file that the user has named. UsageError when that cannot be done."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"{what} cannot be written to {path!r}: {error.strerror}",
            hint="name a file in a directory that exists and can be written",
        ) from error
