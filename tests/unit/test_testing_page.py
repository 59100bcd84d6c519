"""The page on testing has all of the authors' kit, with the signatures that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import nexus_ext.testing as kit
from nexus_ext.testing import FakeEngine


def signature_text(name: str, call: object) -> str:
    """The signature as the page writes it."""
    assert callable(call)
    signature = inspect.signature(call)
    shown = [p for p in signature.parameters.values() if p.name != "self"]
    text = str(signature.replace(parameters=shown))
    text = re.sub(r"(: |-> )'([^']+)'", r"\1\2", text)  # annotations are not evaluated
    # The default prompt is a row of numbers that mean nothing.
    return name + re.sub(r"(prompt: Sequence\[int\] = )\([^)]*\)", r"\1...", text)


FUNCTIONS = [
    *("assert_healthy", "assert_same_tokens", "check_codec", "expert_plan", "load_plugins"),
    *("machine", "recorded_trace", "scripted_server", "synthetic_trace", "use_plugins"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_page_has_the_signatures(name: str, repository: Path) -> None:
    page = " ".join((repository / "plugins/docs/testing.md").read_text(encoding="utf-8").split())
    assert f"- `{signature_text(name, getattr(kit, name))}`" in page


@pytest.mark.parametrize("name", [n for n in vars(FakeEngine) if not n.startswith("_")])
def test_the_page_has_the_methods_of_the_engine(name: str, repository: Path) -> None:
    page = " ".join((repository / "plugins/docs/testing.md").read_text(encoding="utf-8").split())
    assert f"- `{signature_text(name, getattr(FakeEngine, name))}`" in page


def test_the_page_names_everything(repository: Path) -> None:
    page = (repository / "plugins/docs/testing.md").read_text(encoding="utf-8")
    assert not [name for name in kit.__all__ if f"`{name}" not in page and name not in page]
