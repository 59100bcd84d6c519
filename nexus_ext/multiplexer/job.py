"""One request on its way: what it asked for, what it has got, and where its events go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nexus_ext.multiplexer.api import Done, FinishReason, GenerateRequest, Piece, TokenLogprob
from nexus_ext.multiplexer.text import TextStream
from nexus_ext.runtime.sampler import Logits, Sampler, log_probabilities

if TYPE_CHECKING:
    from nexus_ext.runtime.vocabulary import Vocabulary

Event = Piece | Done | BaseException


class Outlet:
    """Carries events from the worker's thread to one task of an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Hand over an event, from any thread. A loop that is gone has nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    async def get(self) -> Event:
        return await self._queue.get()


@dataclass(slots=True, eq=False)
class Job:
    """A request to generate. Touched by the worker's thread; `cancelled` may be set by others."""

    request: GenerateRequest
    put: Callable[[Event], None]
    vocabulary: Vocabulary
    n_ctx: int
    keep_alive_s: float | None = None
    submitted_ns: int = field(default_factory=time.monotonic_ns)
    cancelled: bool = False
    sampler: Sampler = field(init=False)
    text: TextStream = field(init=False)
    tokens: list[int] = field(init=False)  # prompt and answer
    n_prompt: int = field(init=False)
    n_cached: int = 0
    load_ns: int = 0
    started_ns: int = 0  # out of the queue
    first_ns: int = 0  # prompt computed
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        """Build sampler and text. Raises UsageError for a request that cannot be served."""
        self.tokens = list(self.request.prompt)
        self.n_prompt = len(self.tokens)
        self.vocabulary.check(self.tokens)
        sampling = self.request.sampling
        self.sampler = Sampler(
            self.vocabulary.pointer, self.vocabulary.n_tokens, sampling, self.n_ctx
        )
        self.text = TextStream(self.request.stop)
        last_n = sampling.repeat_last_n
        if sampling.penalizes:
            self.sampler.accept_prompt(self.tokens if last_n < 0 else self.tokens[-last_n:])

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def deadline_ns(self) -> int | None:
        """When the first token must be there."""
        after = self.request.deadline_s
        return None if after is None else self.submitted_ns + int(after * 1e9)

    def take(self, logits: Logits) -> None:
        """Pick the next token from `logits` and pass it on; `reason` is set when it is the last."""
        now = time.monotonic_ns()
        self.first_ns = self.first_ns or now
        request, vocabulary = self.request, self.vocabulary
        if request.max_tokens is not None and request.max_tokens <= 0:
            self.finish("length")
            return
        token = self.sampler.pick(logits)
        self.sampler.accept(token)
        if vocabulary.ends(token):
            self.finish("stop")
            return
        self.tokens.append(token)
        raw = vocabulary.piece(token, special=request.special)
        shown = self.text.add(raw)
        logprobs = () if request.logprobs is None else (self._logprobs(token, logits),)
        self.put(Piece(shown, (token,), logprobs))
        if self.text.stopped_by is not None:
            self.finish("stop")
        elif self.n_tokens == request.max_tokens or len(self.tokens) >= self.n_ctx:
            self.finish("length")

    def _logprobs(
        self, token: int, logits: Logits
    ) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
        values = log_probabilities(logits)
        best = (-values).argsort(kind="stable")[: self.request.logprobs or 0]

        def entry(number: int) -> TokenLogprob:
            piece = self.vocabulary.piece(number, special=True)
            return TokenLogprob(number, piece, float(values[number]))

        return entry(token), tuple(entry(int(number)) for number in best)

    def finish(self, reason: FinishReason) -> None:
        """Say that the answer is complete."""
        now = time.monotonic_ns()
        self.reason = reason
        rest = self.text.finish()
        if rest:
            self.put(Piece(rest, ()))
        started = self.started_ns or now
        first = self.first_ns or now
        self.put(
            Done(
                reason="stop" if self.text.stopped_by is not None else reason,
                n_prompt_tokens=self.n_prompt,
                n_cached_tokens=self.n_cached,
                n_tokens=self.n_tokens,
                queue_ns=max(0, started - self.submitted_ns - self.load_ns),
                load_ns=self.load_ns,
                prefill_ns=first - started,
                decode_ns=now - first,
                stop_text=self.text.stopped_by,
            )
        )
        self.close()

    def fail(self, error: BaseException) -> None:
        """Say that there is no answer, and why."""
        self.reason = "abort"
        self.put(error)
        self.close()

    def close(self) -> None:
        self.sampler.close()
