"""Conveniences of llama.cpp's server: health, props, tokenize, detokenize, slots, metrics."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from starlette.responses import JSONResponse, Response

from nexus_ext._version import __version__
from nexus_ext.server.errors import HttpError
from nexus_ext.server.http import Body, Reply
from nexus_ext.server.metrics import CONTENT_TYPE
from nexus_ext.server.plugin_metrics import plugin_metrics
from nexus_ext.server.service import Service


class TokenizeBody(Body):
    model: str | None = None
    content: str
    add_special: bool | None = None
    parse_special: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


class HealthReply(Reply):
    status: Literal["ok"]


class TokensReply(Reply):
    tokens: list[int]


class ContentReply(Reply):
    content: str


async def health(service: Service, _: Any) -> Response:
    """Say whether the server is ready: 503 until the models to preload are loaded."""
    if service.failed:
        name, reason = next(iter(service.failed.items()))
        raise HttpError(503, f"{name} could not be loaded: {reason}", code="load_failed")
    if service.waiting_for:
        name = service.waiting_for[0]
        done = next((s.load_done for s in service.engine.status() if s.name == name), 0.0)
        raise HttpError(
            503,
            f"loading {name}, {done:.0%}",
            code="loading",
            headers={"Retry-After": "1"},
        )
    return JSONResponse({"status": "ok"})


async def props(service: Service, _: Any) -> Response:
    used, total = service.engine.budget()
    engine = service.config.engine
    return JSONResponse(
        {
            "build_info": f"nexus_ext {__version__}",
            "total_slots": engine.n_parallel,
            "default_generation_settings": {"n_ctx": engine.n_ctx},
            "budget": {"used": used, "total": total},
            "gpu_budgets": [
                {"used": used, "total": total} for used, total in service.engine.gpu_budgets()
            ],
            "models": [status.name for status in service.engine.status()],
        }
    )


async def slots(service: Service, _: Any) -> Response:
    return JSONResponse(
        [
            {
                "id": number,
                "model": status.name,
                "state": status.state,
                "n_ctx": status.n_ctx,
                "n_running": status.n_running,
                "n_waiting": status.n_waiting,
                "is_processing": status.n_running > 0,
            }
            for number, status in enumerate(service.engine.status())
        ]
    )


def _only(service: Service, named: str | None) -> str:
    """Return the model that is meant. Without a name it must be clear."""
    if named is not None:
        return named
    running = [status.name for status in service.engine.status()]
    if len(running) != 1:
        raise HttpError(
            400,
            f"the request names no model, and {len(running)} are loaded",
            hint='add "model"',
            param="model",
        )
    return running[0]


async def tokenize(service: Service, body: TokenizeBody) -> Response:
    model = await service.model(_only(service, body.model))
    tokens = await service.engine.tokenize(
        model.name,
        body.content,
        add_bos=bool(body.add_special),
        special=body.parse_special is not False,
    )
    return JSONResponse({"tokens": tokens})


async def detokenize(service: Service, body: DetokenizeBody) -> Response:
    model = await service.model(_only(service, body.model))
    if any(not 0 <= token < model.facts.n_vocab for token in body.tokens):
        raise HttpError(400, f"tokens are 0 to {model.facts.n_vocab - 1}", param="tokens")
    return JSONResponse({"content": await service.engine.detokenize(model.name, body.tokens)})


async def metrics(service: Service, _: Any) -> Response:
    text = service.metrics.text(service.engine.status(), service.engine.budget())
    added = await asyncio.to_thread(plugin_metrics, service.metrics.names())
    return Response(text + added, media_type=CONTENT_TYPE)
