"""What Ollama's endpoints share: options, durations, keep-alives, times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from nexus_ext.errors import UsageError
from nexus_ext.multiplexer.api import Done, GenerateRequest
from nexus_ext.server.errors import HttpError
from nexus_ext.server.prompts import form_grammar
from nexus_ext.server.service import Model, Service
from nexus_ext.store.parameters import checked

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", re.ASCII)
_MAX_KEEP_ALIVE_S = 10.0**9


def keep_alive_s(value: str | int | float | None) -> float | None:
    """Return seconds: a number of them, or Go's way of writing durations ("1h30m", "-1")."""
    if value is None:
        return None
    seconds: float | None = None
    if isinstance(value, (int, float)):
        seconds = float(value)
    elif re.fullmatch(r"-?\d{1,12}(\.\d{1,9})?", value, re.ASCII):
        seconds = float(value)
    else:
        text = value.removeprefix("-")
        parts = _PART.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
            seconds = -seconds if value.startswith("-") else seconds
    if seconds is None:
        raise HttpError(
            400, f"keep_alive is {value!r}", hint='write seconds, or a duration such as "10m"'
        )
    return min(max(seconds, -1.0), _MAX_KEEP_ALIVE_S)


def timestamp(seconds: float | None = None) -> str:
    moment = (
        datetime.now(timezone.utc)
        if seconds is None
        else datetime.fromtimestamp(seconds, timezone.utc)
    )
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def durations(done: Done) -> dict[str, int]:
    """Return what an answer took, in nanoseconds, and its tokens."""
    load = done.queue_ns + done.load_ns
    return {
        "total_duration": load + done.prefill_ns + done.decode_ns,
        "load_duration": load,
        "prompt_eval_count": done.n_prompt_tokens,
        "prompt_eval_duration": done.prefill_ns,
        "eval_count": done.n_tokens,
        "eval_duration": done.decode_ns,
    }


async def request_of(
    service: Service,
    model: Model,
    tokens: list[int],
    options: Mapping[str, Any] | None,
    wanted: Any,
    *,
    grammar: str | None = None,
    special: bool = False,
) -> GenerateRequest:
    """Return what the engine is asked for. `wanted` is `format`."""
    known = _options(options)
    if wanted:
        if grammar is not None:
            raise HttpError(400, "a tool call cannot have another form as well", param="format")
        grammar = await form_grammar(None if wanted == "json" else wanted)
    asked: dict[str, Any] = {**known, "grammar": grammar}
    limit = known.get("num_predict")
    # Below zero: until the context is full.
    most = limit if isinstance(limit, int) and limit >= 0 else None
    return GenerateRequest(
        model=model.name,
        prompt=tokens,
        sampling=service.sampling(model, asked),
        max_tokens=service.limit(model, most),
        stop=service.stops(model, known.get("stop")),
        special=special,
    )


_RANGES = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_penalty": (0, 100),
    "repeat_last_n": (-1, 2**31 - 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 1000),
    "mirostat_eta": (0, 1000),
    "seed": (-(2**63), 2**63),
    "num_predict": (-2, 2**31 - 1),
}


def _options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return checked options. num_ctx and others that load a model differently are not options."""
    given = {name: value for name, value in (options or {}).items() if value is not None}
    try:
        known = checked(given)
    except (UsageError, OverflowError) as error:
        raise HttpError(400, str(error), param="options") from error
    for name, (least, most) in _RANGES.items():
        value = known.get(name)
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise HttpError(400, f"the option {name} is {value}, not between {least} and {most}")
    return known


def no_images(images: Any) -> None:
    if images:
        raise HttpError(400, "this server reads text only: images are not supported", code="images")
