"""/v1/models."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from starlette.responses import JSONResponse, Response

from nexus_ext.server.service import Service
from nexus_ext.store import StoredModel


def _entry(model: StoredModel) -> dict[str, Any]:
    return {
        "id": str(model.name),
        "object": "model",
        "created": int(model.modified_s),
        "owned_by": model.origin,
    }


async def models(service: Service, _: Any) -> Response:
    found = await anyio.to_thread.run_sync(service.library.models)
    return JSONResponse({"object": "list", "data": [_entry(model) for model in found]})


async def model(service: Service, path: dict[str, str]) -> Response:
    return JSONResponse(_entry(service.library.find(path["model"])))
