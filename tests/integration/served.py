"""A live `nexus serve` with real models, in a process of its own, with nothing of the user's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nexus_ext import Llama
from tests.cli_support import COMMAND, run

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}"
    "{% if tools %}{{ tools | length }} tools, write <tool_call>{% endif %}"
)
"""Of chats: knows tools, and shows small models what they were trained on."""


def store_of(home: Path, models: Mapping[str, Path]) -> dict[str, str]:
    """Make a store in `home` with these models; return the environment that leads to it."""
    (home / "chat.jinja").write_text(TEMPLATE)
    made = {
        "NEXUS_MODELS": str(home / "store"),
        "NEXUS_MODELS_OLLAMA": "",
        "NEXUS_MODELS_LM_STUDIO": "",
        "XDG_CONFIG_HOME": str(home),
        "NO_PROXY": "*",
    }
    for name, file in models.items():
        chat = ("--template", home / "chat.jinja")
        assert run("create", name, file, *chat, environment=made).status == 0
    return made


@contextmanager
def served(environment: Mapping[str, str], *options: str) -> Iterator[str]:
    """Run a server and yield its address; it must end in good order."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--budget", "64M", "--port", "0", "--ctx", "256", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        text = ""
        while "}" not in text:
            line = process.stdout.readline()
            assert line, "the server did not start"
            text += line
        yield json.loads(text)["url"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def answer_alone(file: Path, prompt: str, n: int) -> str:
    """Return what a model answers greedily to a chat of one message when nothing is in between."""
    llm = Llama(str(file), n_ctx=256, verbose=False)
    try:
        tokens = llm.tokenize(f"{prompt} ".encode(), add_bos=False, special=True)
        text: str = llm(tokens, max_tokens=n, temperature=0)["choices"][0]["text"]
        return text
    finally:
        llm.close()
