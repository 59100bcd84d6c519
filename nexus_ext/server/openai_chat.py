"""/v1/chat/completions."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from nexus_ext.multiplexer.api import Done, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Answer
from nexus_ext.server.openai_common import Form, chat_logprobs, finish_reason, reply, request_of
from nexus_ext.server.openai_types import ChatBody, NamedTool, ResponseFormat
from nexus_ext.server.prompts import ChatPrompt, Tools, chat_prompt, form_grammar, template_message
from nexus_ext.server.service import Service
from nexus_ext.server.tool_calls import ToolCall, ToolReader


async def chat(service: Service, body: ChatBody) -> Response:
    """Answer a chat."""
    model = await service.model(body.model)
    messages = [
        template_message(message.model_dump(exclude_none=True), f"messages.{number}")
        for number, message in enumerate(body.messages)
    ]
    if body.top_logprobs is not None and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.functions:
        raise HttpError(400, "functions are offered as tools", hint="send tools", param="functions")
    if set(body.modalities or ()) - {"text"}:
        raise HttpError(400, "this server answers in text only", param="modalities")
    prompt = await chat_prompt(
        service,
        model,
        messages,
        tools=tools_of(body),
        grammar=await response_grammar(body.response_format),
        variables=body.chat_template_kwargs,
    )
    request = request_of(
        service,
        model,
        body,
        prompt.tokens,
        max_tokens=(
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        ),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=prompt.grammar,
        special=prompt.form is not None,
    )
    return await reply(service, body, [request], _form(body, prompt))


def tools_of(body: ChatBody) -> Tools | None:
    """Return the tools that may be called. Raises HttpError when the choice names none of them."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        if choice == "required" or isinstance(choice, NamedTool):
            raise HttpError(400, "tool_choice asks for a call, but there is no tool", param="tools")
        return None
    definitions = [tool.model_dump(exclude_none=True) for tool in body.tools]
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if only is not None and only not in [tool.function.name for tool in body.tools]:
        raise HttpError(400, f"tool_choice names {only!r}, no tool of it", param="tool_choice")
    return Tools(definitions, required=choice == "required", only=only)


async def response_grammar(wanted: ResponseFormat | None) -> str | None:
    """Return the grammar of a response_format."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return await form_grammar(None)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise HttpError(
            400, "response_format of type json_schema has no schema", param="response_format"
        )
    return await form_grammar(wanted.json_schema.schema_)


def split(answer: Answer, reader: ToolReader | None) -> tuple[str, list[ToolCall]]:
    """Return the text of an answer and the calls in it."""
    if reader is None:
        return answer.text, []
    parts = [*reader.feed(answer.text), *reader.finish()]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [part for part in parts if isinstance(part, ToolCall)]


class _Parts:
    """The chunks of one answer."""

    def __init__(self, prompt: ChatPrompt, logprobs: bool) -> None:
        self._reader = prompt.reader()
        self._logprobs = logprobs
        self._n_calls = 0
        self._began = False

    def of(self, event: Piece | Done) -> list[dict[str, Any]]:
        reader = self._reader
        if isinstance(event, Done):
            rest = self._deltas(reader.finish() if reader is not None else [])
            finish = finish_reason(event, self._n_calls > 0)
            return [*map(self._part, rest), self._part({}, finish=finish)]
        logprobs = chat_logprobs((event,)) if self._logprobs else None
        deltas: list[dict[str, Any]] = [{"content": event.text}] if event.text else []
        if reader is not None:
            deltas = self._deltas(reader.feed(event.text))
        if not deltas and (logprobs or not self._began):
            deltas = [{} if reader is not None else {"content": ""}]
        return [self._part(d, None if i else logprobs) for i, d in enumerate(deltas)]

    def _part(
        self, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        if not self._began:
            self._began = True
            delta = {"role": "assistant", "content": "", **delta}
        return {"delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _deltas(self, parts: list[str | ToolCall]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                made.append({"content": part})
            else:
                made.append({"tool_calls": [{"index": self._n_calls, **part.as_openai}]})
                self._n_calls += 1
        return made


def _form(body: ChatBody, prompt: ChatPrompt) -> Form:
    logprobs = bool(body.logprobs)
    begun: dict[int, _Parts] = {}

    def choice(number: int, answer: Answer) -> dict[str, Any]:
        text, calls = split(answer, prompt.reader())
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [call.as_openai for call in calls]
        return {
            "message": message,
            "logprobs": chat_logprobs(answer.pieces) if logprobs else None,
            "finish_reason": finish_reason(answer.done, bool(calls)),
        }

    def parts(number: int, event: Piece | Done) -> list[dict[str, Any]]:
        if number not in begun:
            begun[number] = _Parts(prompt, logprobs)
        return begun[number].of(event)

    return Form("chatcmpl", "chat.completion", "chat.completion.chunk", choice, parts)
