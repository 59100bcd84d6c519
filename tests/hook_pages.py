"""The pages of the hooks (plugins/docs/hooks), and the sources that they repeat.

python -m tests.hook_pages    write the signatures of all pages anew from the sources
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from nexus_ext import hooks, hookspecs

HOOKS = [name for name in vars(hookspecs) if name.startswith("nexus_")]
FOLDER = Path(__file__).resolve().parents[1] / "plugins" / "docs" / "hooks"
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def page(hook: str) -> str:
    return (FOLDER / f"{hook}.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Return the Python code of a page: the signature, then the example."""
    return _BLOCK.findall(text)


def source_of(value: Any) -> str:
    """Return the source of a function or a class without its decorators."""
    lines = inspect.getsource(value).rstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
    return "\n".join(lines[start:])


def shown(signature: str) -> list[str]:
    """Return the names of what a page shows beside its hook: those of `nexus_ext.hooks`."""
    nodes = ast.parse(signature).body[1:]
    return [n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef))]


def signature(hook: str) -> str:
    """Return what the signature of a page is to be: the hook, and what the page shows with it."""
    values = [getattr(hookspecs, hook)]
    values += [getattr(hooks, name) for name in shown(blocks(page(hook))[0])]
    return "\n\n\n".join(source_of(value) for value in values) + "\n"


def main() -> None:
    for hook in HOOKS:
        text = page(hook)
        block = f"```python\n{signature(hook)}```"
        (FOLDER / f"{hook}.md").write_text(
            _BLOCK.sub(lambda _, block=block: block, text, count=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
