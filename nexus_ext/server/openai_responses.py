"""/v1/responses: text and calls of functions. Nothing is stored between requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Usage, generate
from nexus_ext.server.openai_common import new_id, now
from nexus_ext.server.openai_types import ResponsesBody
from nexus_ext.server.prompts import ChatPrompt, Tools, chat_prompt, form_grammar, template_message
from nexus_ext.server.service import Service
from nexus_ext.server.streams import named_sse, sse_reply
from nexus_ext.server.tool_calls import ToolCall


async def responses(service: Service, body: ResponsesBody) -> Response:
    """Answer a conversation."""
    if body.previous_response_id is not None:
        raise HttpError(
            400,
            "responses are not stored here, so there is no previous one",
            hint="send the conversation in `input`",
            param="previous_response_id",
        )
    if body.background:
        raise HttpError(400, "there are no background responses here", param="background")
    model = await service.model(body.model)
    prompt = await chat_prompt(
        service, model, messages_of(body), tools=tools_of(body), grammar=await _grammar(body)
    )
    request = GenerateRequest(
        model=model.name,
        prompt=prompt.tokens,
        sampling=service.sampling(
            model,
            {"temperature": body.temperature, "top_p": body.top_p, "grammar": prompt.grammar},
        ),
        max_tokens=service.limit(model, body.max_output_tokens),
        stop=service.stops(model, None),
        session=body.prompt_cache_key,
        special=prompt.form is not None,
    )
    values = _events(service, body, request, prompt)
    if body.stream:
        return await sse_reply(values, service.config.server.send_timeout_s, named_sse)
    async with aclosing(values):
        async for event in values:
            if event["type"] in ("response.completed", "response.incomplete"):
                return JSONResponse(event["response"])
    raise HttpError(500, "the answer has no end", code="internal_error")


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the conversation as chat templates read it. Raises HttpError."""
    messages = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise HttpError(400, "input is an empty list", param="input")
    for number, item in enumerate(body.input):
        messages.append(_message(item, f"input.{number}"))
    return messages


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        role, content = item.get("role"), item.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise HttpError(400, f"{where}.role is {role!r}", param=where)
        if not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(part, dict) for part in content)
        ):
            raise HttpError(400, f"{where}.content is no text and no list of parts", param=where)
        return template_message({"role": role, "content": content}, where)
    if kind == "function_call":
        return template_message(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": _text(item, "call_id", where),
                        "function": {
                            "name": _text(item, "name", where),
                            "arguments": _text(item, "arguments", where),
                        },
                    }
                ],
            },
            where,
        )
    if kind == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": _text(item, "call_id", where),
            "content": _text(item, "output", where),
        }
    raise HttpError(
        400, f"{where} has the type {kind!r}; this server reads messages and calls", param=where
    )


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise HttpError(400, f"{where}.{key} is no text", param=where)
    return value


def tools_of(body: ResponsesBody) -> Tools | None:
    """Return the functions that may be called. Raises HttpError for tools of other kinds."""
    definitions: list[dict[str, Any]] = []
    for number, tool in enumerate(body.tools or []):
        if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise HttpError(
                400,
                f"tools.{number} is no function with a name; this server has no tools of its own",
                param="tools",
            )
        parameters = tool.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise HttpError(400, f"tools.{number}.parameters is no schema", param="tools")
        keys = ("name", "description", "parameters")
        function = {key: tool[key] for key in keys if tool.get(key) is not None}
        definitions.append({"type": "function", "function": function})
    choice = body.tool_choice
    names = [definition["function"]["name"] for definition in definitions]
    only = choice.get("name") if isinstance(choice, dict) else None
    if (isinstance(choice, dict) or choice == "required") and not definitions:
        raise HttpError(400, "tool_choice asks for a call, but there is no tool", param="tools")
    if isinstance(choice, dict) and only not in names:
        raise HttpError(400, f"tool_choice names {only!r}, no tool of it", param="tool_choice")
    if not definitions or choice == "none":
        return None
    return Tools(definitions, required=choice == "required", only=only)


async def _grammar(body: ResponsesBody) -> str | None:
    wanted = (body.text or {}).get("format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return await form_grammar(None)
    if kind == "json_schema" and isinstance(wanted.get("schema"), dict):
        return await form_grammar(wanted["schema"])
    raise HttpError(400, f"text.format is {kind!r}, or has no schema", param="text.format")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.n_prompt,
        "input_tokens_details": {"cached_tokens": usage.n_cached},
        "output_tokens": usage.n_generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.n_prompt + usage.n_generated,
    }


class _Writer:
    """Makes the events of one response, in their order."""

    def __init__(self, body: ResponsesBody) -> None:
        self._n = 0
        self.output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the message that is being written
        self._base = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": now(),
            "model": body.model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._n += 1
        return {"type": kind, "sequence_number": self._n - 1, **fields}

    def response(self, kind: str, status: str, **fields: Any) -> dict[str, Any]:
        made = {**self._base, "status": status, "output": self.output, "usage": None, **fields}
        return self.event(kind, response=made)

    def text(self, text: str) -> list[dict[str, Any]]:
        events = []
        if self._text is None:
            self._text = []
            item = {
                "id": new_id("msg"),
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            self.output.append(item)
            events.append(self._item("response.output_item.added", dict(item)))
            part = {"type": "output_text", "text": "", "annotations": []}
            events.append(self._part("response.content_part.added", part=part))
        self._text.append(text)
        events.append(self._part("response.output_text.delta", delta=text, logprobs=[]))
        return events

    def end_text(self) -> list[dict[str, Any]]:
        if self._text is None:
            return []
        text, self._text = "".join(self._text), None
        part = {"type": "output_text", "text": text, "annotations": []}
        self.output[-1].update(status="completed", content=[part])
        return [
            self._part("response.output_text.done", text=text, logprobs=[]),
            self._part("response.content_part.done", part=part),
            self._item("response.output_item.done", self.output[-1]),
        ]

    def call(self, call: ToolCall) -> list[dict[str, Any]]:
        events = self.end_text()
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        self.output.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        kind = "response.function_call_arguments"
        return [
            *events,
            self._item("response.output_item.added", begun),
            self._argument(f"{kind}.delta", delta=call.arguments),
            self._argument(f"{kind}.done", arguments=call.arguments, name=call.name),
            self._item("response.output_item.done", item),
        ]

    def _item(self, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        return self.event(kind, output_index=len(self.output) - 1, item=item)

    def _argument(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"output_index": len(self.output) - 1, "item_id": self.output[-1]["id"]}
        return self.event(kind, **place, **fields)

    def _part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._argument(kind, content_index=0, **fields)


async def _events(
    service: Service, body: ResponsesBody, request: GenerateRequest, prompt: ChatPrompt
) -> AsyncGenerator[Any, None]:
    writer, reader, usage = _Writer(body), prompt.reader(), Usage()
    begun = False
    async with aclosing(generate(service, request)) as events:
        async for event in events:
            if not begun:  # after the first event: until then it may become an error
                begun = True
                yield writer.response("response.created", "in_progress")
                yield writer.response("response.in_progress", "in_progress")
            parts: list[str | ToolCall] = []
            if isinstance(event, Piece):
                parts = [event.text] if reader is None else reader.feed(event.text)
            elif reader is not None:
                parts = reader.finish()
            for part in parts:
                if part:
                    made = writer.text(part) if isinstance(part, str) else writer.call(part)
                    for each in made:
                        yield each
            if isinstance(event, Done):
                usage.add(event)
                for each in writer.end_text():
                    yield each
                yield _last(writer, event, usage)


def _last(writer: _Writer, done: Done, usage: Usage) -> dict[str, Any]:
    if done.reason == "length":
        return writer.response(
            "response.incomplete",
            "incomplete",
            incomplete_details={"reason": "max_output_tokens"},
            usage=_usage(usage),
        )
    return writer.response("response.completed", "completed", usage=_usage(usage))
