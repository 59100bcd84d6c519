"""The configuration: one TOML file, overridden by the environment, overridden by flags.

`data/nexus.toml` in the package is the documented example; a test holds it against this schema.
NEXUS_<SECTION>_<KEY> overrides a key of [server], [models] or [engine]; lists are written with
commas.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nexus_ext.errors import UsageError
from nexus_ext.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same library under its older name
    import tomli as tomllib

_log = logging.getLogger("nexus_ext.server")

DEFAULT_PORT = 11435


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _listed(value: object) -> object:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Sizes = Annotated[list[Bytes], BeforeValidator(_listed)]
Texts = Annotated[list[str], BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerConfig(_Section):
    """[server]: who may ask, and how much."""

    host: str = "127.0.0.1"
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    api_keys: Texts = []
    cors_origins: Texts = []
    allowed_hosts: Texts = []
    max_body_bytes: Bytes = 16 << 20
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_requests: int = Field(default=256, ge=1)
    queue_timeout_s: float = Field(default=600, gt=0)
    request_timeout_s: float = Field(default=3600, gt=0)
    body_timeout_s: float = Field(default=30, gt=0)
    send_timeout_s: float = Field(default=60, gt=0)
    shutdown_s: int = Field(default=10, ge=1)
    log_prompts: bool = False


class ModelsConfig(_Section):
    """[models]: where models are; "" for a store means that it is not read."""

    store: str | None = None
    ollama: str | None = None
    lm_studio: str | None = None
    preload: Texts = []


class EngineConfig(_Section):
    """[engine]: the budget and what a model gets of it unless it says otherwise."""

    ram: Bytes | None = None
    budget: Bytes | None = None
    n_ctx: int = Field(default=4096, ge=0)
    n_parallel: int = Field(default=4, ge=1)
    n_batch: int = Field(default=512, ge=4)
    n_threads: int = Field(default=0, ge=0)
    kv_type: Literal["f16", "f32", "bf16", "q8_0"] = "f16"
    kernels: Literal["ggml", "auto", "nexus"] = "auto"
    policy: Literal["auto", "direct", "buffered"] = "auto"
    warm_start: bool | None = None
    max_queue: int = Field(default=64, ge=1)
    keep_alive_s: float = 300
    gpu_budgets: Sizes = []
    sessions: str | None = None
    sessions_ram: Bytes | None = None
    sessions_disk: Bytes = 0
    trace: bool = False


class ModelConfig(_Section):
    """[model."NAME"]: what one model has of its own."""

    n_ctx: int | None = Field(default=None, ge=0)
    n_parallel: int | None = Field(default=None, ge=1)
    kv_type: Literal["f16", "f32", "bf16", "q8_0"] | None = None
    kernels: Literal["ggml", "auto", "nexus"] | None = None
    residual: str | None = None
    residual_share: float | None = Field(default=None, ge=0, le=1)
    keep_alive_s: float | None = None
    gpu: int = Field(default=0, ge=0)
    gpu_layers: int | None = Field(default=None, ge=0)
    pinned: bool = False
    priority: int = Field(default=0, ge=0)
    share: Bytes = 0


class Config(_Section):
    server: ServerConfig = ServerConfig()
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    model: dict[str, ModelConfig] = {}


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "server": ServerConfig,
    "models": ModelsConfig,
    "engine": EngineConfig,
}


def _warn_of_unknown(environment: Mapping[str, str]) -> None:
    for name in sorted(environment):
        prefix, _, rest = name.removeprefix("NEXUS_").lower().partition("_")
        section = _SECTIONS.get(prefix) if name.startswith("NEXUS_") else None
        if section is not None and rest and rest not in section.model_fields:
            _log.warning("%s is set, but [%s] has no key %s", name, prefix, rest)


def default_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the configuration is unless --config or NEXUS_CONFIG names another file."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "nexus" / "nexus.toml"


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    flags: Mapping[str, Mapping[str, object]] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Return the configuration of a file, the environment and flags (section -> key -> value).

    A file that is named must exist; the default one may be missing. Flags that are None were not
    given. Raises UsageError, which names the key and the value.
    """
    named = path or environment.get("NEXUS_CONFIG")
    file = Path(named) if named else default_path(environment)
    fields: dict[str, Any] = {}
    if named or file.is_file():
        fields = _read(file)
    _warn_of_unknown(environment)
    for section, model in _SECTIONS.items():
        values = fields.setdefault(section, {})
        if not isinstance(values, dict):
            continue  # refused below, with its name
        for key in model.model_fields:
            text = environment.get(f"NEXUS_{section}_{key}".upper())
            if text is not None:
                values[key] = text
            flag = (flags or {}).get(section, {}).get(key)
            if flag is not None:
                values[key] = flag
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"the configuration has {where} = {first.get('input')!r}: {first['msg'].lower()}"
        if first["type"] == "extra_forbidden":
            what = f"the configuration has {where}, a key that does not exist{_meant(first['loc'])}"
        raise UsageError(
            what,
            hint=f"it comes from {str(file)!r}, from the environment or from a flag; "
            "`nexus serve --example` prints every key with what it means",
        ) from error


def _meant(place: Sequence[int | str]) -> str:
    """Return a guess at what a key that does not exist was meant to be; "" without one."""
    section: type[BaseModel] = Config
    for part in place[:-1]:
        if section is Config:
            section = ModelConfig if part == "model" else _SECTIONS.get(str(part), Config)
    near = get_close_matches(str(place[-1]), section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            fields: dict[str, Any] = tomllib.load(stream)
            return fields
    except OSError as error:
        raise UsageError(
            f"the configuration {str(file)!r} cannot be read: {error.strerror}",
            hint="name a TOML file with --config",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the configuration {str(file)!r} is no TOML: {error}",
            hint="`nexus serve --example` prints one",
        ) from error


def example() -> str:
    """Return the documented example of a configuration."""
    from importlib.resources import files

    return (files("nexus_ext") / "data" / "nexus.toml").read_text(encoding="utf-8")
