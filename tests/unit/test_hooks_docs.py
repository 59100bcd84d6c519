"""Every hook and every setting has its page, with its exact name and signature, and it works."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nexus_ext import hooks, hookspecs
from nexus_ext.cli.serve import serve
from nexus_ext.plugins import Plugins
from nexus_ext.server.config import (
    EngineConfig,
    ModelConfig,
    ModelsConfig,
    ServerConfig,
    tomllib,
)
from tests.hook_pages import FOLDER, HOOKS, blocks, page, shown, signature, source_of
from tests.hook_plugins import Install, installer
from tests.unit import hook_exercises

SECTIONS = ("## Signature", "## When it is called", "## Example", "## When it fails")
ROOT = Path(__file__).resolve().parents[2]


def test_there_is_a_page_for_every_hook_and_for_nothing_else() -> None:
    pages = {path.stem for path in FOLDER.glob("*.md")}
    assert pages == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_page_has_the_exact_signature_of_the_hook_and_of_what_it_speaks_of(hook: str) -> None:
    text = page(hook)
    assert text.startswith(f"# `{hook}`\n")
    assert [text.count(f"\n{section}\n") for section in SECTIONS] == [1, 1, 1, 1]
    assert blocks(text)[0] == signature(hook), "run python -m tests.hook_pages"
    # What the hook itself names is there in full; names of its methods are one of our modules'.
    own = {
        part.id
        for part in ast.walk(ast.parse(source_of(getattr(hookspecs, hook))))
        if isinstance(part, ast.Name) and part.id in hooks.__all__
    }
    assert own <= set(shown(blocks(text)[0]))


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_page_works(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install: Install = installer(tmp_path / "site-packages", monkeypatch)
    (example,) = blocks(page(hook))[1:]
    install("example", example)
    plugins = Plugins(environ={})
    monkeypatch.setattr("nexus_ext.plugins._plugins", plugins)
    exercise: Callable[..., None] = getattr(hook_exercises, hook)
    exercise(plugins, tmp_path, monkeypatch)
    record = next(r for r in plugins.list_plugins() if r.name == "example")
    assert (record.state, record.error) == ("active", "")
    assert hook in record.hooks


def test_the_plugin_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
    (example,) = blocks(text)
    entry = re.search(r"\[project\.entry-points\.nexus_ext\]\n(\S+) = ", text)
    assert entry is not None
    installer(tmp_path / "site-packages", monkeypatch)(entry[1], example)
    hook_exercises.nexus_io_policy(Plugins(environ={}), tmp_path, monkeypatch)


def settings_page() -> str:
    return (ROOT / "plugins" / "docs" / "settings.md").read_text(encoding="utf-8")


def environment_variables() -> set[str]:
    """Every variable of ours that the sources name as a whole string."""
    found = set()
    for folder in ("nexus_ext", "formats", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= set(re.findall(r"^_?NEXUS_[A-Z0-9_]*[A-Z0-9]$", node.value))
        for path in (ROOT / folder).rglob("*.[ch]"):
            found |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")))
    return {name for name in found if "NEXUS" in name}


def test_every_environment_variable_is_documented() -> None:
    documented = set(re.findall(r"^\| `(_?NEXUS_\w+)` \|", settings_page(), re.MULTILINE))
    assert documented == environment_variables()


def test_every_key_of_the_configuration_is_documented() -> None:
    text = settings_page()
    for name, section in (
        ("server", ServerConfig),
        ("models", ModelsConfig),
        ("engine", EngineConfig),
        ("model", ModelConfig),
    ):
        start = text.index(f"### `[{name}]`")
        end = text.find("\n#", start + 1)
        part = text[start:end]
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(section.model_fields)
        if name == "model":
            continue
        for key, field in section.model_fields.items():
            row = re.search(rf"^\| `{key}` \| (.*?) ?\| `(\w+)` \|", part, re.MULTILINE)
            assert row is not None and row[2] == f"NEXUS_{name}_{key}".upper()
            default = tomllib.loads(f"x = {row[1].strip('`')}")["x"] if row[1] else None
            assert getattr(section.model_validate({key: default}), key) == field.default, key


def test_every_option_of_serve_is_documented() -> None:
    text = settings_page()
    part = text[text.index("## Options of `nexus serve`") :]
    known = [
        next(name for name in option.opts if name.startswith("--"))
        for option in serve.params
        if isinstance(option, click.Option)
    ]
    assert sorted(re.findall(r"^\| `(--[\w-]+)` \|", part, re.MULTILINE)) == sorted(known)


def test_the_switches_of_plugins_are_on_the_first_page() -> None:
    text = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
    for name in ("NEXUS_LOAD_PLUGINS", "NEXUS_TRACE_PLUGINS"):
        assert f"| `{name}` |" in text
    assert CliRunner().invoke(serve, ["--help"]).exit_code == 0
