"""An engine of the server that computes nothing: scripted answers, for tests and benchmarks.

Tokens are bytes: token 3 + b is the byte b, 0 ends an answer, 1 is BOS, 2 a control token that is
"<|ctl|>". It keeps the promises of `Engine`: whole UTF-8, stops, limits, one Done, and it counts
what it has running, so that tests can see that a client that goes away frees its place.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from nexus_ext.errors import ModelNotFound, NexusError
from nexus_ext.multiplexer.api import (
    ContextTooLong,
    Done,
    GenerateRequest,
    ModelFacts,
    ModelStatus,
    Piece,
    TokenLogprob,
)

FIRST_BYTE = 3
N_VOCAB = 256 + FIRST_BYTE
Script = Callable[[GenerateRequest], Sequence[bytes]]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}{% if tools %}{{ tools | tojson }} use <tool_call>{% endif %}<go>"
)


def encode(text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return [FIRST_BYTE + byte for byte in data]


def decode(tokens: Sequence[int]) -> str:
    return bytes(t - FIRST_BYTE for t in tokens if t >= FIRST_BYTE).decode("utf-8", "replace")


def by_bytes(text: str) -> list[bytes]:
    """One token a byte: characters of several bytes are split."""
    return [bytes([byte]) for byte in text.encode()]


@dataclass
class ScriptedEngine:
    """Answers every request with what `script` returns: pieces, one a token."""

    models: Sequence[str]
    script: Script = lambda request: by_bytes("Hello, wörld!")
    n_ctx: int = 4096
    chat_template: str | None = CHAT_TEMPLATE
    error: NexusError | Exception | None = None  # raised before the first token
    fail_after: int | None = None  # raised after so many
    gate: asyncio.Semaphore | None = None  # one permit a token, when there is one
    n_cached: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    keep_alives: list[float | None] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    n_running: int = 0
    n_produced: int = 0
    n_abandoned: int = 0
    closed: bool = False

    def _known(self, model: str) -> None:
        if model not in self.models:
            raise ModelNotFound(f"there is no model {model!r}")

    async def facts(self, model: str, *, keep_alive_s: float | None = None) -> ModelFacts:
        self._known(model)
        return ModelFacts(
            name=model,
            path=f"/models/{model}",
            architecture="fake",
            metadata={},
            n_ctx=self.n_ctx,
            n_embd=4,
            n_vocab=N_VOCAB,
            chat_template=self.chat_template,
            bos_text="<s>",
            eos_text="</s>",
            end_tokens=(0,),
        )

    async def tokenize(self, model: str, text: str, *, add_bos: bool, special: bool) -> list[int]:
        self._known(model)
        tokens = []
        if special and text.startswith("<s>"):
            tokens, text = [1], text.removeprefix("<s>")
        elif add_bos:
            tokens = [1]
        return tokens + encode(text)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        self._known(model)
        return decode(tokens)

    async def generate(
        self, request: GenerateRequest, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Piece | Done]:
        self._known(request.model)
        self.requests.append(request)
        self.keep_alives.append(keep_alive_s)
        if self.error is not None:
            raise self.error
        if len(request.prompt) >= self.n_ctx:
            raise ContextTooLong(f"{len(request.prompt)} tokens, the context has {self.n_ctx}")
        self.loaded.add(request.model)
        self.n_running += 1
        ended = False
        try:
            async for event in self._events(request):
                yield event
            ended = True
        finally:
            self.n_running -= 1
            self.n_abandoned += not ended

    async def _events(self, request: GenerateRequest) -> AsyncIterator[Piece | Done]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held, n_tokens, stopped = "", 0, None
        reason = "stop"
        for part in self.script(request):
            if request.max_tokens is not None and n_tokens >= request.max_tokens:
                reason = "length"
                break
            if self.fail_after is not None and n_tokens >= self.fail_after:
                raise RuntimeError("the fake engine broke")
            if self.gate is not None:
                await self.gate.acquire()
            n_tokens += 1
            self.n_produced += 1
            held += decoder.decode(part)
            found = [(held.find(s), s) for s in request.stop if s in held]
            if found:
                place, stopped = min(found)
                held = held[:place]
            keep = 0
            if stopped is None:
                keep = max((_overlap(held, s) for s in request.stop), default=0)
            text, held = held[: len(held) - keep], held[len(held) - keep :]
            yield Piece(text, (encode(part)[0],), _logprobs(request, part))
            if stopped is not None:
                break
        if held and stopped is None:
            yield Piece(held, ())
        yield Done(
            reason=reason,  # type: ignore[arg-type]
            n_prompt_tokens=len(request.prompt),
            n_cached_tokens=self.n_cached,
            n_tokens=n_tokens,
            queue_ns=1_000,
            load_ns=2_000,
            prefill_ns=3_000,
            decode_ns=4_000,
            stop_text=stopped,
        )

    async def embed(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        keep_alive_s: float | None = None,
    ) -> list[list[float]]:
        self._known(model)
        return [[float(len(p)), 0.0, 3.0, 4.0] for p in prompts]

    async def load(self, model: str, *, keep_alive_s: float | None = None) -> None:
        self._known(model)
        self.keep_alives.append(keep_alive_s)
        if self.error is not None:
            raise self.error
        if self.gate is not None:
            await self.gate.acquire()
        self.loaded.add(model)

    async def unload(self, model: str) -> None:
        self._known(model)
        self.loaded.discard(model)

    def status(self) -> Sequence[ModelStatus]:
        return [
            ModelStatus(
                name=name,
                state="ready",
                file_bytes=1000,
                resident_bytes=600,
                kv_bytes=40,
                tier="60 % resident",
                n_ctx=self.n_ctx,
                n_running=self.n_running,
                n_waiting=0,
                load_done=1.0,
                until_s=300.0,
            )
            for name in sorted(self.loaded)
        ]

    def budget(self) -> tuple[int, int]:
        return 640 * len(self.loaded), 4096

    def gpu_budgets(self) -> Sequence[tuple[int, int]]:
        return []

    async def close(self) -> None:
        self.closed = True


def _overlap(text: str, stop: str) -> int:
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def _logprobs(
    request: GenerateRequest, part: bytes
) -> tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...]:
    if request.logprobs is None:
        return ()
    chosen = TokenLogprob(encode(part)[0], part, -0.5)
    others = [TokenLogprob(encode(bytes([n]))[0], bytes([n]), -1.0 - n) for n in range(65, 86)]
    return ((chosen, (chosen, *others)[: request.logprobs]),)
