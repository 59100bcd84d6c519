"""Ollama's endpoints about models: tags, ps, show, create, copy, delete, pull."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio.to_thread
from starlette.responses import JSONResponse, Response

from nexus_ext.errors import NexusError
from nexus_ext.multiplexer.api import ModelStatus
from nexus_ext.runtime.templates import template_reads
from nexus_ext.server import describe
from nexus_ext.server.errors import HttpError
from nexus_ext.server.ollama_common import timestamp
from nexus_ext.server.ollama_types import CopyBody, CreateBody, Named, PullBody, ShowBody
from nexus_ext.server.service import Service
from nexus_ext.server.streams import ndjson_reply
from nexus_ext.store import ModelName, StoredModel
from nexus_ext.store.pull import Progress, pull

# The version of Ollama's API that these endpoints follow; clients compare it.
OLLAMA_VERSION = "0.12.0"


async def version(service: Service, _: Any) -> Response:
    return JSONResponse({"version": OLLAMA_VERSION})


async def tags(service: Service, _: Any) -> Response:
    def listed() -> list[dict[str, Any]]:
        return [describe.listed(model) for model in service.library.models()]

    return JSONResponse({"models": await anyio.to_thread.run_sync(listed)})


async def ps(service: Service, _: Any) -> Response:
    """Return what holds memory. `size_vram` counts what is in a GPU's memory."""
    found, budget = service.engine.status(), service.engine.budget()
    # In a thread: a header that was not read yet takes a moment.
    models = await anyio.to_thread.run_sync(
        lambda: [_running(service, status, budget) for status in found]
    )
    return JSONResponse({"models": models})


def _running(service: Service, status: ModelStatus, budget: tuple[int, int]) -> dict[str, Any]:
    try:
        made = describe.listed(service.library.find(status.name))
    except NexusError:  # removed from the store while it runs
        made = {"name": status.name, "model": status.name, "digest": "", "details": {}}
    until = timestamp(time.time() + status.until_s) if status.until_s is not None else None
    used, total = budget
    return {
        **made,
        "size": status.file_bytes,
        "size_vram": status.gpu_bytes,
        "context_length": status.n_ctx,
        "expires_at": until or "2318-01-01T00:00:00.000000Z",  # as Ollama says "for good"
        # Beyond Ollama's keys:
        "state": status.state,
        "tier": status.tier,
        "resident": status.resident_bytes,
        "kv": status.kv_bytes,
        "running": status.n_running,
        "waiting": status.n_waiting,
        "load_done": status.load_done,
        "until_s": status.until_s,
        "budget_used": used,
        "budget_total": total,
    }


def _name(body: Named) -> str:
    name = body.model or body.name
    if not name:
        raise HttpError(400, "model is required", param="model")
    return name


async def show(service: Service, body: ShowBody) -> Response:
    model = await service.model(_name(body))
    stored = model.stored
    catalog = await anyio.to_thread.run_sync(describe.catalog_of, stored)
    template = model.template
    capabilities = ["completion"]
    if template is not None and "tools" in template_reads(template):
        capabilities.append("tools")
    lines = [f"# Made by nexus_ext. {note}." for note in stored.notes]
    lines.append(f"FROM {stored.path}")
    if stored.system:
        lines.append(f'SYSTEM """{stored.system}"""')
    parameters = describe.parameter_lines(stored)
    lines += [f"PARAMETER {line}" for line in parameters.splitlines()]
    return JSONResponse(
        {
            "license": stored.license,
            "modelfile": "\n".join(lines) + "\n",
            "parameters": parameters,
            "template": template or "",
            "system": stored.system or "",
            "details": describe.details(stored),
            "model_info": describe.model_info(catalog, bool(body.verbose)),
            "capabilities": capabilities,
            "modified_at": timestamp(stored.modified_s),
            "notes": list(stored.notes),
        }
    )


async def copy(service: Service, body: CopyBody) -> Response:
    source = service.library.find(body.source)
    target = ModelName.parse(body.destination)
    await anyio.to_thread.run_sync(service.own.copy, source, target)
    return Response(status_code=200)


async def delete(service: Service, body: Named) -> Response:
    stored = service.own_model(_name(body))
    await service.engine.unload(str(stored.name))
    await anyio.to_thread.run_sync(service.own.remove, stored.name)
    return Response(status_code=200)


async def create(service: Service, body: CreateBody) -> Response:
    """Give a model that there is another name, system text or parameters."""
    for key in ("template", "files", "adapters", "messages", "modelfile", "quantize"):
        if getattr(body, key):
            raise HttpError(
                400,
                f"create over HTTP does not take {key!r}",
                hint="use `from`, `system` and `parameters`; `nexus create` takes files",
                param=key,
            )
    target = ModelName.parse(_name(body))
    if not body.from_:
        raise HttpError(400, "create needs `from`, a model that there is", param="from")
    source = service.library.find(body.from_)
    license = "\n".join(body.license) if isinstance(body.license, list) else body.license

    def make() -> StoredModel:
        return service.own.create(
            target,
            source.path,
            template=source.template,
            system=body.system if body.system is not None else source.system,
            parameters={**source.parameters, **(body.parameters or {})},
            license=license or source.license,
            source=source.source or str(source.name),
        )

    async def statuses() -> AsyncGenerator[Any, None]:
        await anyio.to_thread.run_sync(make)
        yield {"status": f"using existing model {source.name}"}
        yield {"status": "success"}

    return await _statuses(service, statuses(), body.stream)


async def pull_model(service: Service, body: PullBody) -> Response:
    """Download a model from Hugging Face."""
    name = _name(body)

    async def statuses() -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        stopped = False

        def report(progress: Progress) -> bool:
            loop.call_soon_threadsafe(queue.put_nowait, progress)
            return stopped

        def run() -> StoredModel:
            try:
                return pull(name, service.own, report=report)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        yield {"status": "pulling manifest"}
        task = asyncio.ensure_future(asyncio.to_thread(run))
        try:
            while (progress := await queue.get()) is not None:
                yield {
                    "status": progress.status,
                    "digest": progress.file,
                    "total": progress.total_bytes,
                    "completed": progress.done_bytes,
                }
            await task
        finally:
            stopped = True
            # When nobody waits for it any more, how it ended interests nobody either.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        yield {"status": "success"}

    return await _statuses(service, statuses(), body.stream)


async def _statuses(
    service: Service, values: AsyncGenerator[Any, None], stream: bool | None
) -> Response:
    if stream is not False:
        return await ndjson_reply(values, service.config.server.send_timeout_s)
    last = {}
    async for value in values:
        last = value
    return JSONResponse(last)
