"""The tutorial, followed word for word from an empty directory outside of the checkout."""

from __future__ import annotations

import doctest
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clean_environment import CleanEnvironment

_BLOCK = re.compile(
    r"(?:^`(?P<file>[^`\n]+)`\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_END = "--- end of the output, status "
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    """A file to write, or commands with what they print."""

    file: str  # "" for commands
    text: str


def blocks(text: str) -> list[Block]:
    return [
        Block(found["file"] or "", found["text"])
        for found in _BLOCK.finditer(text)
        if found["file"] or found["kind"] == "console"
    ]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command with the output that the page shows for it."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


class Shell:
    """A bash that lives as long as the reader's: what a command changes holds for the next."""

    def __init__(self, environment: CleanEnvironment) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=environment.home,
            env=dict(environment.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[int, str]:
        """Return the status of a command, and all that it printed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{command}\nprintf '\\n{_END}%d\\n' $?\n")
        process.stdin.flush()
        out = ""
        for line in process.stdout:
            if line.startswith(_END):
                return int(line.removeprefix(_END)), out.removesuffix("\n")
            out += line
        raise AssertionError(f"the shell ended in {command!r}:\n{out}")

    def directory(self) -> Path:
        return Path(self.run("pwd")[1].strip())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def expects_failure(output: str) -> bool:
    return "error: " in output


def follow(page: Path, environment: CleanEnvironment) -> list[str]:
    """Do what the page says; return its commands."""
    checker, done = doctest.OutputChecker(), []
    shell = Shell(environment)
    try:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.file:
                file = shell.directory() / block.file
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
                continue
            for command, expected in commands(block.text):
                status, output = shell.run(command)
                assert (status != 0) == expects_failure(expected), f"{command}: {status}\n{output}"
                assert checker.check_output(expected, output + "\n" * bool(output), _LOOSE), (
                    f"$ {command}\n{output}\n--- and the page says\n{expected}"
                )
                done.append(command)
                if "-m venv" in command:  # what `pip install` would download
                    environment.add_packages(shell.directory() / command.split()[-1])
    finally:
        shell.close()
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment(tmp_path_factory.mktemp("clean"))


def test_the_tutorial_works_word_for_word(environment: CleanEnvironment, repository: Path) -> None:
    done = follow(repository / "plugins" / "docs" / "tutorial.md", environment)
    assert "python -m pytest --quiet" in done and "nexus tally" in done


def test_a_page_that_is_wrong_is_noticed(environment: CleanEnvironment, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`a.txt`\n\n```text\nhello\n```\n\n```console\n$ cat a.txt\nhell\n```\n")
    with pytest.raises(AssertionError, match="the page says"):
        follow(page, environment)
    page.write_text("```console\n$ false\n```\n")
    with pytest.raises(AssertionError, match="false: 1"):
        follow(page, environment)
