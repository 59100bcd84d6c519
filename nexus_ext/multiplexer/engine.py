"""`Multiplexer`: what a server sees. Implements the protocol `api.Engine` over a `Scheduler`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nexus_ext.errors import FormatError, ModelClosed, ReadFailed, UsageError
from nexus_ext.multiplexer.api import (
    ContextTooLong,
    Done,
    GenerateRequest,
    ModelFacts,
    ModelStatus,
    Piece,
)
from nexus_ext.multiplexer.embedding import EmbedJob
from nexus_ext.multiplexer.entry import Entry
from nexus_ext.multiplexer.events import EventLog
from nexus_ext.multiplexer.files import Identity, identity
from nexus_ext.multiplexer.job import Job, Outlet
from nexus_ext.multiplexer.scheduler import Scheduler
from nexus_ext.multiplexer.settings import Find, ModelSpec, Settings
from nexus_ext.runtime.batch import Shape
from nexus_ext.runtime.blueprint import Blueprint, Options, blueprint
from nexus_ext.runtime.vocabulary import OwnVocabulary


class Multiplexer:
    """Several models in one budget. Made and used inside of one event loop; see `api.Engine`."""

    def __init__(self, find: Find, settings: Settings, log: EventLog | None = None) -> None:
        self.log = log or EventLog()
        self.settings = settings
        self._find = find
        self._scheduler = Scheduler(settings, self.log)
        self._opening = asyncio.Lock()
        self._closed = False

    # -- facts and text -------------------------------------------------------------------------

    async def facts(self, model: str, *, keep_alive_s: float | None = None) -> ModelFacts:
        entry = await self._entry(model)
        return await asyncio.to_thread(_facts, entry)

    async def tokenize(self, model: str, text: str, *, add_bos: bool, special: bool) -> list[int]:
        vocabulary = (await self._entry(model)).vocabulary
        call = functools.partial(vocabulary.tokenize, text, add_bos=add_bos, special=special)
        return call() if len(text) < 4096 else await asyncio.to_thread(call)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return (await self._entry(model)).vocabulary.detokenize(tokens)

    # -- requests -------------------------------------------------------------------------------

    async def generate(
        self, request: GenerateRequest, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Piece | Done]:
        entry = await self._entry(request.model)
        n_ctx = entry.plan.shape.n_ctx
        if not request.prompt:
            raise UsageError("the prompt has no tokens", hint="begin with BOS, or with a text")
        if len(request.prompt) >= n_ctx:
            raise ContextTooLong(
                f"the prompt has {len(request.prompt)} tokens, the context of {request.model} "
                f"has {n_ctx}, and the answer needs room as well",
                hint="shorten the prompt, or configure a longer context",
            )
        outlet = Outlet()
        job = Job(request, outlet.put, entry.vocabulary, n_ctx, keep_alive_s)
        try:
            self._scheduler.submit(entry, job)
        except BaseException:
            job.close()
            raise
        ended = False
        try:
            while not ended:
                event = await outlet.get()
                if isinstance(event, BaseException):
                    ended = True
                    raise event
                ended = isinstance(event, Done)
                yield event
        finally:
            if not ended:
                self._scheduler.cancel(job)

    async def embed(
        self, model: str, prompts: Sequence[Sequence[int]], *, keep_alive_s: float | None = None
    ) -> list[list[float]]:
        entry = await self._entry(model)
        for prompt in prompts:
            entry.vocabulary.check(prompt)
            if not prompt:
                raise UsageError("a text to embed has no tokens")
            if len(prompt) > entry.plan.shape.n_ctx:
                raise ContextTooLong(
                    f"a text of {len(prompt)} tokens is longer than the context of "
                    f"{entry.plan.shape.n_ctx}",
                    hint="embed it in parts",
                )
        if not prompts:
            return []
        future, tell = _promise()
        job = EmbedJob(prompts, tell, keep_alive_s)
        self._post(lambda: self._scheduler.add_embed(entry, job))
        try:
            vectors: list[list[float]] = await future
        finally:
            job.cancelled = True
        return vectors

    # -- models ---------------------------------------------------------------------------------

    async def load(self, model: str, *, keep_alive_s: float | None = None) -> None:
        entry = await self._entry(model)
        future, tell = _promise()
        self._post(lambda: self._scheduler.want(entry, keep_alive_s, tell))
        await future

    async def unload(self, model: str) -> None:
        """Unload a model once its running requests are done. One that is not loaded is fine."""
        entry = self._scheduler.entries.get(model)
        if entry is None:
            with suppress(FormatError, ReadFailed):  # a file that is gone holds no memory either
                await asyncio.to_thread(self._find, model)  # ModelNotFound for what there is not
            return
        future, tell = _promise()
        self._post(lambda: self._scheduler.unwant(entry, tell))
        await future

    def status(self) -> Sequence[ModelStatus]:
        now = time.monotonic_ns()
        entries = list(self._scheduler.entries.values())
        return [e.status(now) for e in entries if e.loaded or e.waiting]

    def budget(self) -> tuple[int, int]:
        memory = self._scheduler.keeper.memory()
        return memory.used_bytes, memory.budget_bytes

    def gpu_budgets(self) -> Sequence[tuple[int, int]]:
        memory = self._scheduler.keeper.memory()
        return list(zip(memory.gpu_used, memory.gpu_budgets, strict=True))

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._scheduler.close)

    # -- entries --------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        if self._closed:
            raise ModelClosed("the multiplexer is closed")
        self._scheduler.post(command)

    async def _entry(self, name: str) -> Entry:
        """Return what is known of a model. Its header is read the first time, and anew when its
        files are others than they were.
        """
        if self._closed:
            raise ModelClosed("the multiplexer is closed")
        spec, stale = await asyncio.to_thread(self._look, name)
        async with self._opening:
            entry = self._scheduler.entries.get(name)
            if entry is not None and entry.spec == spec and entry is not stale:
                return entry
            return await self._open(spec)

    def _look(self, name: str) -> tuple[ModelSpec, Entry | None]:
        """Return what a name stands for, and what is known of it if that is of other files."""
        spec, known = self._find(name), self._scheduler.entries.get(name)
        if known is not None and known.files != identity(known.plan.catalog):
            return spec, known
        return spec, None

    async def _open(self, spec: ModelSpec) -> Entry:
        plan, files = await asyncio.to_thread(self._plan, spec)
        nbytes = plan.vocabulary_bytes
        future, tell = _promise()
        self._post(lambda: self._scheduler.keeper.claim(spec.name, nbytes, tell))
        await future
        try:
            vocabulary = await asyncio.to_thread(OwnVocabulary, plan.catalog)
        except BaseException:
            self._scheduler.post(lambda: self._scheduler.keeper.unclaim(nbytes))
            raise
        keep = spec.keep_alive_s
        keep = self.settings.keep_alive_s if keep is None else keep
        entry = Entry(spec, plan, vocabulary, keep, files)
        gpus = self.settings.gpus
        entry.gpu_is_unified = bool(gpus) and gpus[spec.gpu].unified
        future, tell = _promise()
        self._post(lambda: self._scheduler.register(entry, tell))
        await future
        return entry

    def _plan(self, spec: ModelSpec) -> tuple[Blueprint, Identity]:
        settings = self.settings
        if spec.gpu >= max(1, len(settings.gpus)) or (spec.gpu_layers and not settings.gpus):
            raise UsageError(
                f"{spec.name} is to use GPU {spec.gpu}, but {len(settings.gpus)} have a budget",
                hint="give each GPU one with --gpu-budget",
            )
        shape = Shape(
            n_seq=spec.n_parallel or settings.n_parallel,
            n_ctx=settings.n_ctx if spec.n_ctx is None else spec.n_ctx,
            n_ubatch=settings.n_ubatch,
            n_threads=settings.n_threads,
            kv_type=spec.kv_type or settings.kv_type,
        )
        options = Options(
            kernels=spec.kernels or settings.kernels,
            policy=settings.policy,
            residual=spec.residual,
            warm_start=settings.warm_start,
            budget_bytes=settings.budget_bytes,
            gpu=spec.gpu,
            gpu_layers=spec.gpu_layers if settings.gpus else 0,
            gpu_budget_bytes=settings.gpus[spec.gpu].nbytes if settings.gpus else 0,
        )
        if spec.residual_share is not None:
            options = replace(options, residual_share=spec.residual_share)
        plan = blueprint(spec.path, shape, options)
        return plan, identity(plan.catalog)


def _promise() -> tuple[asyncio.Future[Any], Callable[[Any], None]]:
    """Return a future of this loop, and a function that settles it from any thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any) -> None:
        if future.done():  # nobody waits any more
            return
        if isinstance(value, BaseException):
            future.set_exception(value)
        else:
            future.set_result(value)

    def tell(value: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value)

    return future, tell


def _facts(entry: Entry) -> ModelFacts:
    catalog, vocabulary = entry.plan.catalog, entry.vocabulary
    template = catalog.metadata.get("tokenizer.chat_template")
    return ModelFacts(
        name=entry.name,
        path=entry.plan.path,
        architecture=catalog.shape.architecture,
        metadata=catalog.metadata,
        n_ctx=entry.plan.shape.n_ctx,
        n_embd=catalog.shape.n_embd,
        n_vocab=vocabulary.n_tokens,
        chat_template=template if isinstance(template, str) else None,
        bos_text=vocabulary.text(vocabulary.bos),
        eos_text=vocabulary.text(vocabulary.eos),
        end_tokens=vocabulary.end_tokens(),
    )
