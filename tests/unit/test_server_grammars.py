"""Grammars that would end the process are refused; others pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.runtime.templates import json_grammar, schema_grammar
from nexus_ext.server.grammars import MAX_CHARACTERS, MAX_DEPTH, check_grammar


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
        (r'root ::= "\x00"', "NUL"),
        (r'root ::= "\u0000"', "NUL"),
        (r'root ::= "\U00000000"', "NUL"),
        (r"root ::= [\x00-\x1F]", "NUL"),
        (r'root ::= "a\\\x00"', "NUL"),
        ('root ::= "\0"', "NUL"),
        ('root ::= "a"{1,10001}', "repeats"),
        ('root ::= "a"{99999999999999999999}', "repeats"),
        ("# " * MAX_CHARACTERS, "characters"),
    ],
)
def test_what_would_end_the_process_is_refused(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        check_grammar(text)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a"',
        'root ::= "' + "(" * 2000 + '"',
        "root ::= [" + "(" * 2000 + "]",
        "# " + "(" * 2000 + '\nroot ::= "a"{1,10000}',
        "root ::= " + "(" * MAX_DEPTH + '"a"' + ")" * MAX_DEPTH,
        r'root ::= "\\x00" [^\x00-\x1F] "\""',
        "root ::= [",
        'root ::= "abc',
        'root ::= "a"{',
        "",
    ],
)
def test_what_llama_cpp_can_judge_itself_passes(text: str) -> None:
    check_grammar(text)


def test_grammars_of_schemas_pass() -> None:
    check_grammar(json_grammar())
    check_grammar(schema_grammar({"type": "string", "maxLength": 2000}))
    with pytest.raises(UsageError):
        check_grammar(schema_grammar({"type": "string", "maxLength": 5000}))


@given(st.text(alphabet='()[]{}"\\#^x0u,1\n a', max_size=60))
def test_whatever_is_sent_is_judged(text: str) -> None:
    try:
        check_grammar(text)
    except UsageError as error:
        assert str(error).startswith("the grammar")
