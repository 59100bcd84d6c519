"""The OpenAPI description, from the table of endpoints and the types of their bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nexus_ext._version import __version__
from nexus_ext.server.http import Api, Endpoint

_ERRORS: dict[Api, dict[str, Any]] = {
    "openai": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    "ollama": {
        "type": "object",
        "properties": {"error": {"type": "string"}},
        "required": ["error"],
    },
    "llama.cpp": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "code": {"type": "integer"},
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                },
                "required": ["code", "message", "type"],
            }
        },
        "required": ["error"],
    },
}


# What one event, or one line, of a stream is.
_PART: dict[str, Any] = {
    "text/event-stream": {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["data"],
    },
    "application/x-ndjson": {"type": "object"},
}


def description(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the description of `endpoints` as OpenAPI 3.1."""
    models: dict[type[BaseModel], Any] = {}
    for endpoint in endpoints:
        for model in (endpoint.body, endpoint.reply):
            if model is not None:
                models[model] = None
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = dict(definitions.get("$defs", {}))
    for api, schema in _ERRORS.items():
        schemas[_error_name(api)] = schema
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        refs = {model: references[(model, "validation")] for model in models}
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nexus_ext", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _error_name(api: Api) -> str:
    return {"openai": "OpenAIError", "ollama": "OllamaError", "llama.cpp": "LlamaCppError"}[api]


def _operation(endpoint: Endpoint, refs: dict[type[BaseModel], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.media_type:
        schema: dict[str, Any] = {}
        if endpoint.reply is not None:
            schema = refs[endpoint.reply]
        elif endpoint.media_type == "text/plain":
            schema = {"type": "string"}
        content[endpoint.media_type] = {"schema": schema}
    if endpoint.stream is not None:
        content[endpoint.stream] = {"schema": _PART[endpoint.stream]}
    good: dict[str, Any] = {"description": "What was asked for."}
    if content:
        good["content"] = content
    error = {"$ref": f"#/components/schemas/{_error_name(endpoint.api)}"}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "tags": [endpoint.api],
        "operationId": f"{endpoint.method.lower()}_{endpoint.path.strip('/') or 'root'}",
        "responses": {
            "200": good,
            "default": {
                "description": "What is wrong.",
                "content": {"application/json": {"schema": error}},
            },
        },
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": refs[endpoint.body]}},
        }
    if endpoint.parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in endpoint.parameters
        ]
    return operation
