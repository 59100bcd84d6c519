"""What plugins see of a run: models, requests, routers. Values that are handed over, never back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from nexus_ext.policies.base import IoMode

Interface = Literal["python", "server"]
Outcome = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that was loaded, as the lifecycle hooks see it."""

    path: str
    fingerprint: str
    architecture: str
    resident_bytes: int  # weights and pools in memory
    streamed_bytes_per_token: int  # 0 when everything fits
    io_mode: IoMode | None  # None when nothing is streamed


@dataclass(frozen=True, slots=True)
class RequestStart:
    """A request that is about to be computed."""

    id: str  # the one that RequestInfo has; unique in this process
    interface: Interface  # `nexus_ext.Llama`, or the server
    model: str  # the name that was asked for; the path with `nexus_ext.Llama`
    n_prompt_tokens: int
    started_unix_ns: int  # nanoseconds since 1970


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """A request that has ended."""

    model: ModelInfo
    n_prompt_tokens: int
    n_tokens: int  # generated
    prefill_ns: int
    decode_ns: int
    read_bytes: int  # from the disk, over the whole request; 0 where that is not counted
    id: str = ""
    interface: Interface = "python"
    model_name: str = ""  # as RequestStart.model
    outcome: Outcome = "stop"
    error: str = ""  # with outcome "error": its class and text
    n_cached_tokens: int = 0  # of the prompt, whose KV state was there already
    queue_ns: int = 0
    load_ns: int = 0
    started_unix_ns: int = 0
    ended_unix_ns: int = 0


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """What the router of one layer decided in one call of the model."""

    layer: int
    experts: tuple[tuple[int, ...], ...]  # (tokens of the call, experts of a token)


@dataclass(frozen=True, slots=True)
class Routing:
    """What all routers decided in one call of the model: one token of decode, or a part of prefill.

    Layers whose experts are all resident are left out: nobody asks which of them are used.
    """

    model: ModelInfo
    layers: tuple[LayerRouting, ...]  # in the order in which they were computed


@runtime_checkable
class RouterObserver(Protocol):
    """Sees which experts the routers choose."""

    name: str

    def observe(self, routing: Routing) -> None:
        """See one call of the model; called after it, in the thread that made it."""
        ...
