"""Pages for authors of plugins: links lead somewhere, code is code, and benchmarks are there."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
PAGES = sorted(p for p in PLUGINS.rglob("*.md") if not {"node_modules", ".venv"} & set(p.parts))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(PLUGINS).as_posix()


def anchors(page: Path) -> set[str]:
    """Names of the sections of a page, as they are linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, section = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (section and section not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_code_can_be_read(page: Path) -> None:
    for kind, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            ast.parse(block)
        elif kind == "toml":
            tomllib.loads(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_benchmarks_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"python -m (tests\.bench\.\w+)", page.read_text(encoding="utf-8")))
    assert not [name for name in named if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("page", sorted((PLUGINS / "docs").glob("*.md")), ids=name_of)
def test_the_entry_page_leads_to_every_other(page: Path) -> None:
    text = (PLUGINS / "README.md").read_text(encoding="utf-8")
    assert f"(docs/{page.name})" in text
