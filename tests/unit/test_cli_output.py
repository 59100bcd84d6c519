"""The sink: what people, programs and terminals get."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.cli.live import Live, column_after
from nexus_ext.cli.output import Output, error_fields, json_text, write
from nexus_ext.cli.text import TextStream
from nexus_ext.errors import DoesNotFit, ReadFailed
from nexus_ext.types import Role
from tests.cli_support import COMMAND
from tests.models_folder import find_model


@dataclass(frozen=True)
class Point:
    x: float
    role: Role


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> str:
    """What a terminal shows of `written`: the sequences that progress uses, carried out."""
    cells: list[str] = []
    cursor = saved = 0
    place = 0
    while place < len(written):
        for sequence in ("\x1b[J", "\x1b7", "\x1b8", "\x1b[2m", "\x1b[22m"):
            if written.startswith(sequence, place):
                place += len(sequence)
                if sequence == "\x1b[J":
                    del cells[cursor:]
                elif sequence == "\x1b7":
                    saved = cursor
                elif sequence == "\x1b8":
                    cursor = saved
                break
        else:
            assert written[place] != "\x1b"
            cells[cursor : cursor + 1] = [written[place]]
            cursor += 1
            place += 1
    return "".join(cells)


def test_json_has_neither_infinity_nor_lone_surrogates() -> None:
    value = {"a": math.inf, "b": [math.nan, Point(1.5, Role.FFN)], "c": "x\udc80", "d": Path("/m")}
    assert json.loads(json_text(value)) == {
        "a": None,
        "b": [None, {"x": 1.5, "role": "ffn"}],
        "c": "x?",
        "d": "/m",
    }


def test_errors_carry_what_programs_need() -> None:
    fields = error_fields(DoesNotFit("too small", hint="more", smallest_bytes=7))
    assert fields == {
        "code": "does_not_fit",
        "message": "too small",
        "hint": "more",
        "smallest_bytes": 7,
    }
    fields = error_fields(ReadFailed("no", path="/m", offset=4096, errno=5))
    assert (fields["path"], fields["offset"], fields["errno"]) == ("/m", 4096, 5)


@pytest.mark.parametrize("n_rows", [3, 300])
def test_tables_line_up_however_long(n_rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("name", ">bytes"), [("[bold]x", str(i)) for i in range(n_rows)], total=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "bytes"]
    rows = [line for line in lines if "[bold]x" in line]  # markup of a file stays text
    assert len(rows) == n_rows
    assert len({len(row) for row in rows}) == 1
    assert rows[-1].split() == ["[bold]x", str(n_rows - 1)]


def test_quiet_writes_the_answer_and_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("quiet")
    output.line("line")
    output.heading("heading")
    output.note("note")
    output.table(("a",), [("b",)])
    output.result({"a": 1})
    output.text("answer")
    output.error(DoesNotFit("sentence", hint="fix", smallest_bytes=1))
    out, err = capsys.readouterr()
    assert out == "answer"
    assert err == "error: sentence\nhint: fix\n"


def test_json_writes_one_document_only(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("json")
    output.line("line")
    output.note("note")
    output.text("answer")
    output.result({"text": "answer"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": "answer"} and not err


def test_a_stream_without_unicode_gets_what_it_can_show() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write(stream, "caf\u00e9 \U0001f642\n")
    assert raw.getvalue() == b"caf? ?\n"


@given(st.text(), st.lists(st.integers(1, 4), max_size=200))
def test_text_is_the_same_however_its_bytes_are_cut(text: str, cuts: list[int]) -> None:
    data, parts = text.encode(), []
    stream = TextStream()
    for size in cuts:
        parts.append(stream.feed(data[:size]))
        data = data[size:]
    parts += [stream.feed(data), stream.finish()]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_a_character_that_is_cut_off_by_the_end_is_not_shown() -> None:
    stream = TextStream()
    assert stream.feed("a\u20ac".encode()[:-1]) + stream.finish() == "a"


def test_bytes_that_are_no_text_do_not_stop_it() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xff") + stream.feed(b"b") + stream.feed(b"c") == "a\ufffdbc"


@given(
    st.text("ab.", max_size=30),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    st.integers(1, 3),
)
def test_text_ends_before_the_first_stop_and_loses_nothing(
    text: str, stops: list[str], step: int
) -> None:
    stream = TextStream(stops)
    shown, fed = "", 0
    while fed < len(text) and not stream.stopped:
        shown += stream.feed(text[fed : fed + step].encode())
        fed += step
    shown += stream.finish()
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert stream.stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        # Text that came in one piece is searched as a whole; across pieces, the first end wins.
        assert text.startswith(shown)
        assert len(shown) >= min(ends)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("column", "text", "after"),
    [(0, "abc", 3), (5, "x\nab", 2), (3, "\n", 0), (9, "ab", 1), (0, "日本", 4), (0, "e\u0301", 1)],
)
def test_the_column_of_the_cursor_is_known(column: int, text: str, after: int) -> None:
    assert column_after(column, text, 10) == after


def test_progress_leaves_nothing_between_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    moments = iter(range(100))
    monkeypatch.setattr("nexus_ext.cli.live.time.monotonic", lambda: float(next(moments)))
    live = Live(Output())
    live.status("loading 1 of 2")
    assert screen(terminal.getvalue()) == "loading 1 of 2"
    live.status("loading 2")
    assert screen(terminal.getvalue()) == "loading 2"
    live.text("Once")
    live.status("1 token")
    assert screen(terminal.getvalue()) == "Once  1 token"
    live.text(" upon")
    live.status("2 tokens")
    live.end_line()
    assert screen(terminal.getvalue()) == "Once upon\n"


def test_progress_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live(Output())
    live.status("loading")
    with live.ticking(lambda: "tick"):
        live.text("answer")
    monkeypatch.setattr(sys, "stderr", Terminal())
    quiet = Live(Output("quiet"))
    quiet.status("loading")
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "answer"


COMMANDS = [
    ["inspect", str(find_model("stories260K-q4_0.gguf"))],
    ["inspect", str(find_model("stories260K-q4_0.gguf")), "--json"],
    ["plugins"],
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_stdout_is_one_sentence(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_a_command_without_streams_does_its_work(command: list[str], closed: str) -> None:
    line = " ".join(map(shlex.quote, [*COMMAND, *command]))
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
