"""Bodies of Ollama's API, checked at the edge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nexus_ext.server.http import Body, Whole

Duration = str | int | float


class Named(Body):
    """A body that names a model by `model`, or by `name` as older clients do."""

    model: str | None = None
    name: str | None = None


class GenerateBody(Body):
    model: str
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    stream: bool | None = None
    raw: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    images: list[str] | None = None
    keep_alive: Duration | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None


class OllamaFunction(Body):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaToolCall(Body):
    function: OllamaFunction


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None


class OllamaChatBody(Body):
    model: str
    messages: list[OllamaMessage] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=256)
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    keep_alive: Duration | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None


class EmbedBody(Body):
    model: str
    input: str | Annotated[list[str], Field(max_length=2048)] | None = None
    truncate: bool | None = None
    dimensions: Whole | None = Field(None, ge=1)
    keep_alive: Duration | None = None
    options: dict[str, Any] | None = None


class EmbeddingsBody(Body):
    model: str
    prompt: str | None = None
    keep_alive: Duration | None = None
    options: dict[str, Any] | None = None


class ShowBody(Named):
    verbose: bool | None = None


class CopyBody(Body):
    source: str
    destination: str


class PullBody(Named):
    stream: bool | None = None
    insecure: bool | None = None


class CreateBody(Named):
    from_: str | None = Field(None, alias="from")
    system: str | None = None
    template: str | None = None
    parameters: dict[str, Any] | None = None
    license: str | list[str] | None = None
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    messages: list[dict[str, Any]] | None = None
    modelfile: str | None = None
    quantize: str | None = None
    stream: bool | None = None
