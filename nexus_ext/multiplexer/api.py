"""What a server asks of the multiplexer, and what it gets back: values and one protocol.

Knows nothing of HTTP, of llama.cpp or of where models come from. A request names a model and holds
token numbers: templates and tokenization are asked of `Engine` first, so that what is computed is
exactly what the request says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nexus_ext.errors import ModelNotFound, NexusError
from nexus_ext.runtime.sampling import Sampling

__all__ = [
    "ContextTooLong",
    "Done",
    "Engine",
    "FinishReason",
    "GenerateRequest",
    "ModelFacts",
    "ModelNotFound",
    "ModelState",
    "ModelStatus",
    "Overloaded",
    "Piece",
    "Sampling",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "abort"]
ModelState = Literal["loading", "ready", "idle", "unloading"]


class Overloaded(NexusError, RuntimeError):
    """The queue is full or the deadline would pass. `retry_after_s` says when to come back."""

    code = "overloaded"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class ContextTooLong(NexusError, ValueError):
    """A prompt has more tokens than the model's context."""

    code = "context_too_long"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion of one prompt."""

    model: str
    prompt: Sequence[int]  # token numbers, BOS included where the model wants one
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None  # None: until the context is full
    stop: Sequence[str] = ()  # texts that end the answer and are not part of it
    logprobs: int | None = None  # so many of the best alternatives of each token; None: none
    deadline_s: float | None = None  # from now until the first token; Overloaded when it passes
    session: str | None = None  # requests of one conversation: its KV state is worth keeping
    special: bool = False  # whether control tokens that do not end the answer appear in its text


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    piece: bytes  # may be a part of a UTF-8 sequence
    logprob: float


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to the answer. `text` is whole UTF-8 and may be empty."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()  # (chosen, best)


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of every request that was not refused."""

    reason: FinishReason
    n_prompt_tokens: int
    n_cached_tokens: int  # of the prompt, whose KV state was there already
    n_tokens: int  # generated
    queue_ns: int
    load_ns: int  # until the model could compute (0 when it was ready)
    prefill_ns: int
    decode_ns: int
    stop_text: str | None = None  # which of `stop` ended it


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model that holds memory, as `nexus ps` shows it."""

    name: str
    state: ModelState
    file_bytes: int
    resident_bytes: int  # weights and expert records in memory now
    kv_bytes: int
    tier: str  # "resident", "streaming" or "62 % resident"
    n_ctx: int
    n_running: int
    n_waiting: int
    load_done: float  # 0..1 while loading
    until_s: float | None  # when it may be unloaded, from now; None: kept
    gpu_bytes: int = 0  # weights, KV cache and buffers on its GPU


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What templates and APIs need to know of a model."""

    name: str
    path: str
    architecture: str
    metadata: Mapping[str, object]
    n_ctx: int
    n_embd: int
    n_vocab: int
    chat_template: str | None
    bos_text: str
    eos_text: str
    end_tokens: tuple[int, ...]


class Engine(Protocol):
    """Everything that a server needs. All methods may be called from one event loop at once."""

    async def facts(self, model: str, *, keep_alive_s: float | None = None) -> ModelFacts:
        """Return facts of a model, from its header: nothing is loaded. Raises ModelNotFound."""
        ...

    async def tokenize(
        self, model: str, text: str, *, add_bos: bool, special: bool
    ) -> list[int]: ...

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str: ...

    def generate(
        self, request: GenerateRequest, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Piece | Done]:
        """Yield what is generated, then one Done. Closing the iterator stops it within a token.

        Raises ModelNotFound, Overloaded, ContextTooLong, DoesNotFit, or what reading may raise.
        keep_alive_s: how long the model is kept after this request; None: as configured; below
        0: for good.
        """
        ...

    async def embed(
        self, model: str, prompts: Sequence[Sequence[int]], *, keep_alive_s: float | None = None
    ) -> list[list[float]]: ...

    async def load(self, model: str, *, keep_alive_s: float | None = None) -> None: ...

    async def unload(self, model: str) -> None: ...

    def status(self) -> Sequence[ModelStatus]: ...

    def budget(self) -> tuple[int, int]:
        """Return (used, total) bytes of the budget."""
        ...

    def gpu_budgets(self) -> Sequence[tuple[int, int]]:
        """Return (used, total) bytes of each GPU that has a budget."""
        ...

    async def close(self) -> None: ...
