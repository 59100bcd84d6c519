"""`nexus run` with streamed weights: what it writes, where, and how it ends."""

from __future__ import annotations

import signal
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from nexus_ext.cli.demo import MODEL
from nexus_ext.runtime.stock import stock_llama
from tests.cli_support import COMMAND, Done, hardware_file, on_terminal, run, with_template

PROMPT = "Once upon a time"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
)
PIECES = "héé 🙂 日本"  # none of these has a token: their bytes come one token each


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of every run here: most weights streamed, nothing measured, one thread."""
    hardware = hardware_file(tmp_path_factory.mktemp("hardware"))
    return ["--weights", "1M", "--hardware", str(hardware), "-t", "1", "--temp", "0"]


@pytest.fixture(scope="module")
def expected() -> str:
    """What stock llama.cpp answers, greedily, with 24 tokens."""
    llm = stock_llama(str(MODEL), n_ctx=512, n_threads=1, verbose=False)
    try:
        prompt = llm.tokenize(PROMPT.encode())
        tokens = list(islice(llm.generate(prompt, temp=0.0), 24))
        return bytes(llm.detokenize(tokens)).decode()
    finally:
        llm.close()


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(MODEL, TEMPLATE, tmp_path_factory.mktemp("chat") / "chat.gguf")


def answer(options: list[str], *arguments: str, stdin: str = "", model: Path = MODEL) -> Done:
    return run("run", model, *options, *arguments, stdin=stdin)


def test_the_answer_is_stdout_and_the_accounting_stderr(options: list[str], expected: str) -> None:
    done = answer(options, PROMPT, "-n", "24")
    assert (done.status, done.out) == (0, expected)
    for words in ("24 tokens", "tok/s", "prefill 5 tokens", "read a token", "I/O wait", "bound"):
        assert words in done.err
    assert done.err.count("\n") == 1 and "\x1b" not in done.err


def test_quiet_is_the_answer_alone(options: list[str], expected: str) -> None:
    done = answer(options, PROMPT, "-n", "24", "--quiet")
    assert (done.out, done.err) == (expected, "")


def test_json_has_the_answer_and_the_accounting(options: list[str], expected: str) -> None:
    done = answer(options, PROMPT, "-n", "24", "--json")
    fields = done.json
    assert fields["text"] == expected and not done.err
    accounting = fields["accounting"]
    assert (accounting["tokens"], accounting["finish"]) == (24, "length")
    assert accounting["streaming"] and accounting["decode_stats"]["passes"] == 23
    streamed = fields["plan"]["streamed_bytes_per_token"]
    assert streamed / 2 < accounting["bytes_read_per_token"] < streamed * 2


def test_everything_that_fits_runs_without_us(expected: str, options: list[str]) -> None:
    done = answer(options[2:], PROMPT, "-n", "24", "--json")
    assert done.json["text"] == expected
    assert not done.json["accounting"]["streaming"]
    assert done.json["plan"]["everything_fits"]


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_prompt_can_be_piped_in(
    options: list[str], expected: str, arguments: tuple[str, ...]
) -> None:
    done = answer(options, *arguments, "-n", "24", stdin=PROMPT + "\n")
    assert done.out == expected


def test_characters_of_several_tokens_arrive_whole(options: list[str], tmp_path: Path) -> None:
    grammar = tmp_path / "pieces.gbnf"
    grammar.write_text(f'root ::= "{PIECES}"', encoding="utf-8")
    done = answer(options, PROMPT, "--grammar-file", str(grammar), "--json")
    assert done.json["text"] == PIECES
    assert done.json["accounting"]["tokens"] > len(PIECES.encode()) - 4
    # Cut off within a character: what is there of it is not shown.
    n = str(done.json["accounting"]["tokens"] - 1)
    done = answer(options, PROMPT, "--grammar-file", str(grammar), "-n", n)
    assert done.out == PIECES[:-1]


def test_a_json_schema_is_obeyed(options: list[str]) -> None:
    done = answer(options, PROMPT, "--json-schema", '{"enum": ["yes", "no"]}')
    assert done.out.strip() in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("--grammar-file", "root ::= (", "no grammar that llama.cpp can parse"),
        ("--json-schema-file", "{", "cannot be made a grammar"),
    ],
)
def test_a_wrong_grammar_is_an_error_and_no_crash(
    options: list[str], tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    done = answer(options, PROMPT, name, str(tmp_path / "file"))
    assert done.status == 2 and words in done.err and not done.out


def test_a_stop_is_not_shown(options: list[str], expected: str) -> None:
    word = expected.split()[4]
    done = answer(options, PROMPT, "-n", "24", "--stop", word, "--json")
    assert done.json["text"] == expected.partition(word)[0]
    assert done.json["accounting"]["finish"] == "stop"


def test_a_seed_repeats_an_answer(options: list[str]) -> None:
    sampled = ("--temp", "1.5", "--top-k", "0", "--repeat-penalty", "1.1", "-n", "16", "--json")
    first = answer(options, PROMPT, *sampled).json
    again = answer(options, PROMPT, *sampled, "--seed", str(first["seed"])).json
    assert again["text"] == first["text"] and again["seed"] == first["seed"]


def test_a_plan_from_a_file_is_used(options: list[str], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned = ("--pin", "ffn_down.weight=nvme", *options[:4], "-o", str(file))
    assert run("plan", MODEL, *planned, "--quiet").status == 0
    done = answer(options[2:], PROMPT, "-n", "24", "--plan", str(file), "--json")
    assert done.json["text"] == expected and done.json["accounting"]["streaming"]
    other = answer(options[2:], PROMPT, "--plan", str(tmp_path / "none.json"))
    assert other.status == 2 and "nexus plan" in other.err


def test_a_prompt_that_is_too_long_is_wrong_usage(options: list[str]) -> None:
    done = answer(options, PROMPT, "-c", "4")
    assert done.status == 2 and "--ctx" in done.err


def test_a_budget_that_is_too_small_is_status_3(options: list[str]) -> None:
    done = answer(options, PROMPT, "--weights", "10K", "--json")
    assert done.status == 3 and done.json["error"]["smallest_bytes"] > 10 << 10


def test_the_models_own_template_is_used(options: list[str], chat_model: Path) -> None:
    plain = f"[system] Be kind\n[user] {PROMPT}\n[assistant]"
    system = ("--system", "Be kind", "-n", "12", "--json")
    written = answer(options, plain, "--no-chat", *system[2:], model=chat_model).json
    done = answer(options, PROMPT, *system, model=chat_model).json
    assert done["text"] == written["text"]
    assert done["accounting"]["prompt_tokens"] == written["accounting"]["prompt_tokens"]


def test_a_template_that_fails_is_an_error(options: list[str], tmp_path: Path) -> None:
    model = with_template(MODEL, "{{ raise_exception('no') }}", tmp_path / "m.gguf")
    done = answer(options, PROMPT, model=model)
    assert done.status == 2 and "--no-chat" in done.err and "Traceback" not in done.err


def test_a_chat_keeps_what_was_said(options: list[str], chat_model: Path) -> None:
    chat = ("-i", "-n", "6", "--quiet")
    one = answer(options, *chat, stdin="Hello\n", model=chat_model).out
    two = answer(options, *chat, stdin="Hello\nWho?\n", model=chat_model).out
    fresh = answer(options, *chat, stdin="Hello\n/clear\nWho?\n", model=chat_model).out
    assert two.startswith(one) and fresh.startswith(one)
    history = f"[user] Hello\n[assistant] {one.removesuffix(chr(10))}\n[user] Who?\n[assistant]"
    known = answer(options, history, "--no-chat", "-n", "6", model=chat_model).out
    forgotten = answer(options, "[user] Who?\n[assistant]", "--no-chat", "-n", "6").out
    assert two[len(one) :] == known + "\n"
    assert fresh[len(one) :] == forgotten + "\n"


def test_a_chat_without_a_template_says_so_and_goes_on(options: list[str], expected: str) -> None:
    done = answer(options, "-i", "-n", "24", stdin=f"{PROMPT}\n/stats\n/nonsense\n/exit\nnever\n")
    assert done.status == 0
    assert done.out == expected + "\n"
    assert "no chat template" in done.err
    assert "24 tokens" in done.err and "There is no /nonsense" in done.err


def test_an_error_ends_an_answer_and_not_the_chat(options: list[str]) -> None:
    long = PROMPT * 20
    done = answer(options, "-i", "-n", "4", "-c", "64", stdin=f"{long}\n{PROMPT}\n")
    assert done.status == 0 and "--ctx" in done.err and done.out.startswith(",")
    assert "/clear forgets" not in done.err, "nothing was said before"


def test_a_chat_that_has_filled_its_context_goes_on_when_it_is_cleared(options: list[str]) -> None:
    lines = [*[PROMPT] * 8, "/clear", PROMPT, "/bye", "never said"]
    done = answer(options, "-i", "-n", "4", "-c", "32", stdin="\n".join(lines))
    assert done.status == 0 and "--ctx" in done.err and "/clear forgets it" in done.err
    answers = done.out.splitlines()
    assert 1 < len(answers) < 10, "some did not fit, and nothing is said after /bye"
    assert answers[-1] == answers[0] and done.err.rstrip().endswith("Forgotten.")


def test_a_chat_has_no_json(options: list[str]) -> None:
    assert answer(options, "-i", "--json").status == 2


def test_ctrl_c_ends_the_answer_with_status_130(options: list[str]) -> None:
    status, screen = on_terminal("run", MODEL, *options, PROMPT, typed=[("there was", "\x03")])
    assert status == 130
    assert "Traceback" not in screen and "Exception" not in screen
    assert screen.rstrip().splitlines()[-1].partition(" tokens, ")[0].isdigit()
    # No mode of the terminal was changed, so there is none that could be left behind.
    assert "\x1b[?" not in screen


def test_a_signal_does_the_same_without_a_terminal(options: list[str]) -> None:
    command = [*COMMAND, "run", str(MODEL), *options, PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        first = child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        out, err = first + child.stdout.read(), child.stderr.read()
    assert child.returncode == 130
    assert out.startswith(b",") and b" tokens, " in err and b"Traceback" not in err


def test_in_a_chat_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(options: list[str]) -> None:
    status, screen = on_terminal(
        "run",
        MODEL,
        *options,
        typed=[("> ", PROMPT + "\n"), ("there was", "\x03"), ("\n> ", "/stats\n"), ("> ", "\x04")],
    )
    assert status == 0
    assert "I/O wait" in screen and "Traceback" not in screen


def test_a_reader_that_leaves_is_no_error(options: list[str]) -> None:
    command = [*COMMAND, "run", str(MODEL), *options, PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141
