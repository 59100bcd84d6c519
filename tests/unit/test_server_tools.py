"""Calls of tools in answers: three forms, whole or in parts, and what is none."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.server.tool_calls import (
    Form,
    ToolCall,
    ToolReader,
    argument_key,
    call_grammar,
    call_schema,
    form_of,
)

CALL = '{"name": "add", "arguments": {"a": 1, "b": "</x>"}}'


def reader(form: Form) -> ToolReader:
    numbers = count()
    return ToolReader(form, ["add", "sub"], lambda: f"call_{next(numbers)}")


def read(form: Form, *parts: str) -> list[str | ToolCall]:
    """What a reader gives out, texts that follow each other joined."""
    one = reader(form)
    found: list[str | ToolCall] = []
    for part in [*(p for text in parts for p in one.feed(text)), *one.finish()]:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


ADD = ToolCall("call_0", "add", '{"a": 1, "b": "</x>"}')


@pytest.mark.parametrize(
    ("form", "text", "wanted"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [ADD]),
        ("hermes", f"Let me see.\n<tool_call>{CALL}</tool_call>\n", ["Let me see.", ADD]),
        (
            "hermes",
            f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
            [ADD, ToolCall("call_1", "add", ADD.arguments)],
        ),
        ("hermes", "a < b <tool> <tool_cal", ["a < b <tool> <tool_cal"]),
        ("hermes", f"<tool_call>{CALL}", [ADD]),
        ("hermes", "<tool_call>{broken}</tool_call>", ["<tool_call>{broken}</tool_call>"]),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None),
        ("hermes", '<tool_call>{"name": "add", "arguments": "x"}</tool_call>', None),
        ("mistral", f"[TOOL_CALLS][{CALL}]", [ADD]),
        ("mistral", f"Yes.[TOOL_CALLS] [{CALL}]", ["Yes.", ADD]),
        ("mistral", "[TOOL_CALLS]oh", ["[TOOL_CALLS]oh"]),
        ("mistral", "[TOOL", ["[TOOL"]),
        ("json", '{"name": "sub", "parameters": {}}', [ToolCall("call_0", "sub", "{}")]),
        ("json", f"<|python_tag|>{CALL}", [ADD]),
        ("json", f"[{CALL}]", [ADD]),
        ("json", f"Text, then {CALL}", None),
        ("json", '{"other": 1}', None),
        ("json", "[1, 2", None),
        ("json", "plain", ["plain"]),
    ],
)
def test_calls_are_told_from_text(
    form: Form, text: str, wanted: list[str | ToolCall] | None
) -> None:
    assert read(form, text) == (wanted if wanted is not None else [text])


@given(st.sampled_from(["hermes", "mistral", "json"]), st.data())
def test_how_an_answer_is_cut_into_parts_changes_nothing(form: Form, data: st.DataObject) -> None:
    mark = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "json": ""}[form]
    end = "</tool_call>" if form == "hermes" else ""
    text = data.draw(
        st.sampled_from(
            [f"{mark}{CALL}{end}", f"one <to {mark}{CALL}{end}", f"{mark[:5]} two", "a [TOOL b"]
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, *parts) == read(form, text)


def test_text_before_a_call_is_given_out_at_once() -> None:
    one = reader("hermes")
    assert one.feed("Let me see") == ["Let me see"]
    assert one.feed(". <tool") == ["."]
    assert one.feed("s are good") == [" <tools are good"]


def test_a_call_that_does_not_end_becomes_text() -> None:
    one = reader("hermes")
    given = "<tool_call>" + "x" * (1 << 20)
    assert one.feed(given) == [given]


def test_the_form_is_that_of_the_template() -> None:
    assert form_of("... <tool_call> ...") == "hermes"
    assert form_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert form_of("ipython") == "json"
    assert argument_key("json", '{"name": n, "parameters": p}') == "parameters"
    assert argument_key("hermes", '"parameters"') == "arguments"


@pytest.mark.parametrize("form", ["hermes", "mistral", "json"])
def test_the_grammar_of_a_call_is_one_that_the_converter_makes(form: Form) -> None:
    from nexus_ext.runtime.templates import schema_grammar

    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}
    tools = [
        {"name": "add", "parameters": {"$ref": "#/$defs/n", "$defs": {"n": node}}},
        {"name": "sub"},
    ]
    schema = call_schema(tools, "arguments")
    assert json.dumps(schema).count("#/$defs/tool0.n") == 2
    grammar = call_grammar(form, schema_grammar(schema))
    heads = [line.split(" ::= ")[0] for line in grammar.splitlines()]
    assert heads.count("root") == 1 and heads.count("nexus-call") == 1
    assert len(set(heads)) == len(heads)
