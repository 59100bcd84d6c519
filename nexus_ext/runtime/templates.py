"""What llama-cpp-python knows about text: chat templates by its own code, grammars of schemas.

A template is a program in a model's file. It runs in Jinja's immutable sandbox, as llama-cpp-python
runs it, so that a server's prompt is the one that `Llama.create_chat_completion` would make.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llama_cpp.llama_grammar import json_schema_to_gbnf

from nexus_ext.errors import UsageError

# llama-cpp-python's grammars let line breaks into strings, which JSON does not allow.
_ANY_CHARACTER = r'[^"\\]'
_JSON_CHARACTER = r'[^"\\\x7F\x00-\x1F]'


@functools.lru_cache(maxsize=64)
def _formatter(template: str, bos_text: str, eos_text: str) -> Jinja2ChatFormatter:
    return Jinja2ChatFormatter(template, eos_token=eos_text, bos_token=bos_text)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_text: str,
    eos_text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt that a chat template makes of messages.

    `variables` are given to the template besides (enable_thinking and the like). The text holds
    BOS where the template writes it: tokenize it without another. Raises UsageError when the
    template refuses the conversation.
    """
    known = {"messages", "tools", "eos_token", "bos_token", "add_generation_prompt"}
    extra = {name: value for name, value in (variables or {}).items() if name not in known}
    asked: Any = list(messages)
    asked_tools: Any = list(tools) if tools else None
    try:
        formatter = _formatter(template, bos_text, eos_text)
        made = formatter(messages=asked, tools=asked_tools, **extra)
    except Exception as error:  # a program in the file: it may raise anything
        raise UsageError(
            f"the model's chat template refuses this conversation: {error}",
            hint="check the order of the roles, and that the template knows what was asked",
        ) from error
    return str(made.prompt)


@functools.lru_cache(maxsize=64)
def template_reads(template: str) -> frozenset[str]:
    """Return the names of the variables that a template looks at ("tools", for instance)."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    environment.add_extension(Jinja2ChatFormatter.IgnoreGenerationTags)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError as error:
        raise UsageError(
            f"the model's chat template cannot be parsed: {error}",
            hint="give the model another one: `nexus create NAME FROM FILE --template FILE`",
        ) from error


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """Return the GBNF grammar of a JSON schema. Raises UsageError when there is none."""
    if "$ref" in schema and "$defs" in schema:
        # The converter does not look beside a reference: put it where it has no neighbours.
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**rest, "anyOf": [{"$ref": schema["$ref"]}]}
    try:
        grammar = json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:  # whatever the converter stumbles over in the user's schema
        raise UsageError(
            f"the JSON schema cannot be made a grammar: {str(error) or repr(error)}"[:500],
            hint="use types, properties, required, items, enum, const, anyOf and $ref below $defs",
        ) from error
    return str(grammar).replace(_ANY_CHARACTER, _JSON_CHARACTER)


def json_grammar() -> str:
    """Return the grammar of any JSON object."""
    return schema_grammar({"type": "object", "additionalProperties": True})
