"""Calls of tools in what a model writes: which form its template asks for, and reading it.

Three forms are known, and JSON without a mark for templates that ask for no other:

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Hermes, Qwen
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    json      {"name": ..., "parameters": {...}}                          Llama 3, others

What is no well-formed call of a tool that the request has named stays text, as the model wrote it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["hermes", "mistral", "json"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_PYTHON = "<|python_tag|>"  # Llama 3.1 may write it before the JSON
_ANYTHING = {"type": "object", "additionalProperties": True}
_MAX_HELD = 1 << 20  # characters of a call that does not end; then it is text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wants made; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    @property
    def as_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def form_of(template: str) -> Form:
    """Return the form in which a chat template asks for calls."""
    if _OPEN in template:
        return "hermes"
    return "mistral" if _MISTRAL in template else "json"


def argument_key(form: Form, template: str) -> str:
    """Return the key that holds the arguments in this template's form."""
    return "parameters" if form == "json" and '"parameters"' in template else "arguments"


def new_id() -> str:
    return "call_" + secrets.token_hex(12)


class ToolReader:
    """Tells calls from text in an answer that arrives in parts.

    Text is given out as soon as it cannot be the beginning of a call; a call when it is whole.
    """

    def __init__(
        self, form: Form, names: Sequence[str], new_id: Callable[[], str] = new_id
    ) -> None:
        self._form = form
        self._names = frozenset(names)
        self._new_id = new_id
        self._held = ""
        self._inside = False  # behind a mark, or in JSON that may be a call
        self._any_text = False
        self._any_call = False

    def feed(self, text: str) -> list[str | ToolCall]:
        self._held += text
        out: list[str | ToolCall] = []
        while self._step(out):
            continue
        return out

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back: calls if they are whole, else text."""
        held, self._held = self._held, ""
        if self._inside:
            calls = self._calls(self._unmarked(held))
            if calls:
                return [*calls]
        # Blanks behind calls are nobody's text.
        return [held] if held and not (self._any_call and held.isspace()) else []

    def _step(self, out: list[str | ToolCall]) -> bool:
        """Take what is certain from the held text; return whether there may be more."""
        if self._inside:
            return self._step_inside(out)
        mark = _OPEN if self._form == "hermes" else _MISTRAL if self._form == "mistral" else ""
        if self._form == "json":
            return self._step_json(out)
        place = self._held.find(mark)
        if place >= 0:
            self._give(out, self._held[:place].rstrip() if place else "")
            self._held = self._held[place:]
            self._inside = True
            return True
        keep = _overlap(self._held, mark)
        # Blanks before a mark belong to it.
        text = self._held[: len(self._held) - keep]
        kept = len(text) - len(text.rstrip())
        text = text[: len(text) - kept]
        self._give(out, text)
        self._held = self._held[len(text) :]
        return False

    def _step_inside(self, out: list[str | ToolCall]) -> bool:
        if len(self._held) > _MAX_HELD:
            self._inside = False
            self._give(out, self._held)
            self._held = ""
            return False
        if self._form != "hermes":
            return False  # ends with the answer
        end = self._held.find(_CLOSE)
        if end < 0:
            return False
        whole = self._held[: end + len(_CLOSE)]
        self._held = self._held[end + len(_CLOSE) :]
        self._inside = False
        calls = self._calls(self._unmarked(whole))
        if calls:
            self._any_call = True
            out += calls
        else:
            self._give(out, whole)
        return bool(self._held)

    def _step_json(self, out: list[str | ToolCall]) -> bool:
        """An answer is either one call (or a list of them) from its beginning on, or text."""
        start = self._held.lstrip()
        if self._any_text:
            self._give(out, self._held)
            self._held = ""
        elif start.startswith(("{", "[", _PYTHON)):
            self._inside = True
            return True
        elif start and not _PYTHON.startswith(start):
            self._give(out, self._held)
            self._held = ""
        return False

    def _give(self, out: list[str | ToolCall], text: str) -> None:
        if text:
            self._any_text = True
            out.append(text)

    def _unmarked(self, text: str) -> str:
        text = text.strip()
        for mark in (_OPEN, _MISTRAL, _PYTHON):
            text = text.removeprefix(mark)
        return text.removesuffix(_CLOSE).strip()

    def _calls(self, text: str) -> list[ToolCall]:
        """Return the calls that the whole of `text` is; none if any part of it is none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                return []
            name = item.get("name")
            arguments = item.get("arguments", item.get("parameters"))
            if name not in self._names or not isinstance(arguments, dict):
                return []
            text = json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(self._new_id(), str(name), text))
        return calls


def _overlap(text: str, mark: str) -> int:
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)


def call_schema(tools: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return the JSON schema of a call of one of `tools` (functions of OpenAI's form)."""
    choices = []
    definitions: dict[str, Any] = {}
    for number, function in enumerate(tools):
        parameters = dict(function.get("parameters") or _ANYTHING)
        place = f"#/$defs/tool{number}"
        # What the parameters define comes to the top as well, under names that cannot collide.
        inner = parameters.pop("$defs", None)
        if isinstance(inner, dict):
            for name, schema in inner.items():
                definitions[f"tool{number}.{name}"] = _moved(schema, place)
        definitions[f"tool{number}"] = _moved(parameters, place)
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, key: {"$ref": place}},
                "required": ["name", key],
            }
        )
    return {"anyOf": choices, "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    """Return a schema whose references to itself lead to where it now is."""
    if isinstance(value, list):
        return [_moved(v, place) for v in value]
    if not isinstance(value, dict):
        return value
    moved = {}
    for key, inner in value.items():
        if key == "$ref" and isinstance(inner, str) and inner.startswith("#"):
            end = inner.removeprefix("#/$defs/")
            moved[key] = f"{place}.{end}" if end != inner else place + inner[1:]
        else:
            moved[key] = _moved(inner, place)
    return moved


def call_grammar(form: Form, schema_grammar: str) -> str:
    """Return the grammar of one call in this form, from the grammar of its JSON."""
    lines = [
        "nexus-call" + line.removeprefix("root") if line.startswith("root ::=") else line
        for line in schema_grammar.splitlines()
    ]
    root = {
        "hermes": f'root ::= "{_OPEN}\\n" nexus-call "\\n{_CLOSE}"',
        "mistral": f'root ::= "{_MISTRAL}[" nexus-call "]"',
        "json": "root ::= nexus-call",
    }[form]
    return "\n".join([root, *lines]) + "\n"
