"""The table of all endpoints. Routes and the OpenAPI description are made of it."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import JSONResponse, PlainTextResponse, Response

from nexus_ext.server import llama_cpp, ollama_generate, ollama_models, openai_models
from nexus_ext.server import ollama_types as ollama
from nexus_ext.server import openai_types as openai
from nexus_ext.server.http import Endpoint
from nexus_ext.server.openai_chat import chat
from nexus_ext.server.openai_completions import completions, embeddings
from nexus_ext.server.openai_responses import responses
from nexus_ext.server.service import Service

_SSE: Final = "text/event-stream"
_NDJSON: Final = "application/x-ndjson"


async def _root(service: Service, _: Any) -> Response:
    return PlainTextResponse("nexus_ext is running\n")


async def _openapi(service: Service, _: Any) -> Response:
    from nexus_ext.server.openapi import description

    return JSONResponse(description(ENDPOINTS))


_OPENAI: Final = (
    Endpoint("openai", "GET", "/v1/models", openai_models.models, "List models",
             reply=openai.ModelsReply),
    Endpoint("openai", "GET", "/v1/models/{model}", openai_models.model, "Describe a model",
             reply=openai.ModelReply, parameters=("model",)),
    Endpoint("openai", "POST", "/v1/chat/completions", chat, "Answer a chat",
             body=openai.ChatBody, reply=openai.ChatReply, stream=_SSE, heavy=True),
    Endpoint("openai", "POST", "/v1/completions", completions, "Complete texts",
             body=openai.CompletionBody, reply=openai.CompletionReply, stream=_SSE, heavy=True),
    Endpoint("openai", "POST", "/v1/embeddings", embeddings, "Return vectors of texts",
             body=openai.EmbeddingBody, reply=openai.EmbeddingsReply, heavy=True),
    Endpoint("openai", "POST", "/v1/responses", responses, "Answer a conversation",
             body=openai.ResponsesBody, reply=openai.ResponsesReply, stream=_SSE, heavy=True),
)  # fmt: skip

_OLLAMA: Final = (
    Endpoint("ollama", "GET", "/api/version", ollama_models.version, "Say the version"),
    Endpoint("ollama", "GET", "/api/tags", ollama_models.tags, "List models"),
    Endpoint("ollama", "GET", "/api/ps", ollama_models.ps, "List models that hold memory"),
    Endpoint("ollama", "POST", "/api/show", ollama_models.show, "Describe a model",
             body=ollama.ShowBody),
    Endpoint("ollama", "POST", "/api/generate", ollama_generate.generate_text, "Answer a prompt",
             body=ollama.GenerateBody, stream=_NDJSON, heavy=True),
    Endpoint("ollama", "POST", "/api/chat", ollama_generate.chat, "Answer a chat",
             body=ollama.OllamaChatBody, stream=_NDJSON, heavy=True),
    Endpoint("ollama", "POST", "/api/embed", ollama_generate.embed, "Return vectors of texts",
             body=ollama.EmbedBody, heavy=True),
    Endpoint("ollama", "POST", "/api/embeddings", ollama_generate.embeddings,
             "Return the vector of a text", body=ollama.EmbeddingsBody, heavy=True),
    Endpoint("ollama", "POST", "/api/pull", ollama_models.pull_model, "Download a model",
             body=ollama.PullBody, stream=_NDJSON, heavy=True),
    Endpoint("ollama", "POST", "/api/create", ollama_models.create, "Give a model a name",
             body=ollama.CreateBody, stream=_NDJSON),
    Endpoint("ollama", "POST", "/api/copy", ollama_models.copy, "Give a model one more name",
             body=ollama.CopyBody, media_type=""),
    Endpoint("ollama", "DELETE", "/api/delete", ollama_models.delete, "Remove a model",
             body=ollama.Named, media_type=""),
)  # fmt: skip

_LLAMA_CPP: Final = (
    Endpoint("llama.cpp", "GET", "/", _root, "Say that the server is there",
             media_type="text/plain"),
    Endpoint("llama.cpp", "GET", "/health", llama_cpp.health, "Say whether the server is ready",
             reply=llama_cpp.HealthReply),
    Endpoint("llama.cpp", "GET", "/props", llama_cpp.props, "Say how the server is set up"),
    Endpoint("llama.cpp", "GET", "/slots", llama_cpp.slots, "List what is computed"),
    Endpoint("llama.cpp", "GET", "/metrics", llama_cpp.metrics, "Count, for Prometheus",
             media_type="text/plain"),
    Endpoint("llama.cpp", "POST", "/tokenize", llama_cpp.tokenize, "Return the tokens of a text",
             body=llama_cpp.TokenizeBody, reply=llama_cpp.TokensReply),
    Endpoint("llama.cpp", "POST", "/detokenize", llama_cpp.detokenize, "Return the text of tokens",
             body=llama_cpp.DetokenizeBody, reply=llama_cpp.ContentReply),
    Endpoint("llama.cpp", "GET", "/openapi.json", _openapi, "Describe this API"),
)  # fmt: skip

ENDPOINTS: Final = (*_OPENAI, *_OLLAMA, *_LLAMA_CPP)
