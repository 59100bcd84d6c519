"""From messages, tools and a wanted form to what is computed: tokens, a grammar, and a reader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from nexus_ext.runtime import templates
from nexus_ext.server.errors import HttpError
from nexus_ext.server.service import Model, Service
from nexus_ext.server.tool_calls import (
    Form,
    ToolReader,
    argument_key,
    call_grammar,
    call_schema,
    form_of,
)


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools that a request offers, and how they may be used."""

    definitions: Sequence[Mapping[str, Any]] = ()  # as OpenAI has them: {"type", "function"}
    required: bool = False
    only: str | None = None  # the one that must be called

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        return [
            tool["function"]
            for tool in self.definitions
            if self.only is None or tool["function"]["name"] == self.only
        ]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What to compute for a chat."""

    tokens: list[int]
    grammar: str | None
    form: Form | None  # in which calls of tools are written; None: no tools
    names: tuple[str, ...]

    def reader(self) -> ToolReader | None:
        return ToolReader(self.form, self.names) if self.form is not None else None


def text_of(content: Any, where: str) -> str:
    """Return the text of a message's content. Raises HttpError for what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text"):
            raise HttpError(
                400,
                f"{where}.content has a part of type {kind!r}; this server reads text only",
                hint="send parts of type 'text'",
                param=f"{where}.content.{number}.type",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise HttpError(400, f"{where}.content.{number} has no text", param=where)
        texts.append(text)
    return "".join(texts)


def template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message as chat templates read it: text, and arguments as objects."""
    role = message["role"]
    made: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": text_of(message.get("content"), where),
    }
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            made[key] = message[key]
    calls = message.get("tool_calls")
    if calls:
        made["tool_calls"] = [_template_call(call) for call in calls]
    return made


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {
        "id": call.get("id") or "",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


async def chat_prompt(
    service: Service,
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    grammar: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Return what to compute for a chat. `messages` are as `template_message` makes them.

    Raises UsageError when the model has no template or its template refuses, HttpError when it
    does not know tools.
    """
    template = model.chat_template()
    messages = list(messages)
    if model.stored.system and all(m["role"] != "system" for m in messages):
        messages.insert(0, {"role": "system", "content": model.stored.system})
    form: Form | None = None
    names: tuple[str, ...] = ()
    if tools is not None and tools.definitions:
        if "tools" not in templates.template_reads(template):
            raise HttpError(
                400,
                f"the chat template of {model.name} does not know tools",
                hint="use a model that was trained to call tools",
                param="tools",
            )
        form = form_of(template)
        names = tuple(str(function["name"]) for function in tools.functions)
        if tools.required or tools.only is not None:
            if grammar is not None:
                raise HttpError(
                    400, "a tool call cannot have another form as well", param="tool_choice"
                )
            schema = call_schema(tools.functions, argument_key(form, template))
            json_grammar = await anyio.to_thread.run_sync(templates.schema_grammar, schema)
            grammar = call_grammar(form, json_grammar)

    def render() -> str:
        return templates.render_chat(
            template,
            messages,
            bos_text=model.facts.bos_text,
            eos_text=model.facts.eos_text,
            tools=tools.definitions if tools is not None else None,
            variables=variables,
        )

    # In a thread: a template is a program, and a long conversation takes it a while.
    text = await anyio.to_thread.run_sync(render)
    # The template writes BOS itself where the model wants one.
    tokens = await service.engine.tokenize(model.name, text, add_bos=False, special=True)
    return ChatPrompt(service.checked(model, tokens), grammar, form, names)


async def form_grammar(wanted: Any) -> str:
    """Return the grammar of a JSON schema, or of any JSON object for None."""
    if wanted is None:
        return await anyio.to_thread.run_sync(templates.json_grammar)
    return await anyio.to_thread.run_sync(templates.schema_grammar, wanted)
