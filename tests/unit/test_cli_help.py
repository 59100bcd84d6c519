"""What `nexus --help` costs, what it says, and that its examples are command lines."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys

import click
import pytest

from nexus_ext import __version__
from nexus_ext.cli import cli
from nexus_ext.cli.app import COMMANDS, LazyCommand, NexusGroup
from tests.cli_support import call, run

HEAVY = {"numpy", "llama_cpp", "gguf", "highspy", "rich", "_cffi_backend"}
UNUSED = {
    "nexus_ext.placement",
    "nexus_ext.formats",
    "nexus_ext.hardware",
    "nexus_ext.runtime",
    "nexus_ext.core",
}


def examples(command: click.Command) -> list[str]:
    """The lines below "Examples:" of a help text."""
    _, _, text = (command.help or "").partition("Examples:")
    return [line.strip() for line in text.splitlines() if line.strip()]


def loaded_command(name: str) -> click.Command:
    with click.Context(cli) as context:
        command = cli.get_command(context, name)  # type: ignore[attr-defined]
    assert isinstance(command, click.Command)
    return command


def test_help_imports_no_command_and_nothing_heavy() -> None:
    code = """
import json, sys
from nexus_ext.cli import cli
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert not {name.split(".")[0] for name in modules} & HEAVY
    assert not modules & UNUSED
    assert not {target.partition(":")[0] for target, _ in COMMANDS.values()} & modules


def test_without_a_command_the_help_is_shown_as_it_is() -> None:
    done = call()
    assert done.status == 2 and not done.out
    assert done.err.rstrip("\n") == call("--help").out.rstrip("\n")


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback() -> None:
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from nexus_ext.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_help_lists_every_command() -> None:
    done = call("--help")
    assert done.status == 0
    for name, (_, short_help) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(short_help[:30])}", done.out, re.MULTILINE)


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").out.strip() == f"nexus, version {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name: str) -> None:
    command = loaded_command(name)
    assert command.name == name
    assert examples(command)
    done = call(name, "--help")
    assert done.status == 0
    assert {"--json", "--quiet", "--debug"} <= set(re.findall(r"--\w+", done.out))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line(name: str) -> None:
    for example in [*examples(loaded_command(name)), *examples(cli)]:
        line = re.split(r" [|<>] ", example)[0]
        words = shlex.split(line)
        while "=" in words[0]:  # NAME=value before the command
            words.pop(0)
        assert words[0] == "nexus", example
        # Parsed only; a wrong option, choice or size raises.
        loaded_command(words[1]).make_context(words[1], words[2:], resilient_parsing=False)


def test_every_name_in_the_table_is_a_command() -> None:
    for name, (target, _) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command) and command.name == name


def test_a_mistyped_command_is_corrected() -> None:
    done = call("inpsect")
    assert done.status == 2
    assert "no command 'inpsect'" in done.err and "nexus inspect" in done.err


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "m.gguf", "--nonsense"], ["--nonsense"]])
def test_wrong_usage_is_status_2_and_one_sentence(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.status == 2 and not done.out
    assert done.err.startswith("error: ") and done.err.count("\n") == 2
    assert "--help" in done.err


def test_wrong_usage_with_json_is_json() -> None:
    done = call("plan", "--json")
    assert done.status == 2
    assert done.json["error"]["code"] == "usage"
    assert "MODEL" in done.json["error"]["message"]


def test_plugins_add_commands_and_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("hello", short_help="Say hello.")
    def hello() -> int:
        click.echo("hello")
        return 7

    class Plugins:
        def register_commands(self, group: click.Group) -> None:
            group.add_command(hello)

    monkeypatch.setattr("nexus_ext.plugins.plugins", Plugins)
    group = NexusGroup("nexus")
    assert isinstance(group.commands["run"], LazyCommand)
    monkeypatch.setattr("tests.cli_support.cli", group)
    assert "Commands of plugins:\n  hello" in call("--help").out
    done = call("hello")
    assert (done.status, done.out) == (7, "hello\n")


def test_a_shell_can_complete_commands() -> None:
    environment = {"_NEXUS_COMPLETE": "bash_complete", "COMP_WORDS": "nexus in", "COMP_CWORD": "1"}
    assert run(environment=environment).out.strip() == "plain,inspect"
