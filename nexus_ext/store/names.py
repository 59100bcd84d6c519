"""Names of models: [[host/]namespace/]name[:tag], as Ollama's users write them.

A name is checked when it is parsed, and a store makes paths of parsed names only: no name can lead
out of a store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nexus_ext.errors import UsageError

DEFAULT_TAG = "latest"
MAX_PARTS = 3

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95}", re.ASCII)
_HINT = (
    "a name is [[host/]namespace/]name[:tag] of letters, digits and _ . - "
    '(for instance "qwen3:8b" or "bartowski/Qwen3-8B-GGUF:Q4_K_M")'
)


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A name whose parts are safe as names of files."""

    parts: tuple[str, ...]  # host, namespace and name; the last is always there
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Return the name that `text` is. Raises UsageError."""
        path, colon, tag = text.partition(":")
        parts = tuple(path.split("/"))
        if not colon:
            tag = DEFAULT_TAG
        for part in (*parts, tag):
            if _PART.fullmatch(part) is None:
                shown = text if len(text) <= 100 else text[:100] + "..."
                raise UsageError(f"{shown!r} is no name of a model", hint=_HINT)
        if len(parts) > MAX_PARTS:
            raise UsageError(
                f"the name {text!r} has {len(parts)} parts, the most is {MAX_PARTS}", hint=_HINT
            )
        return cls(parts, tag)

    @property
    def path(self) -> str:
        """The name without its tag."""
        return "/".join(self.parts)

    def __str__(self) -> str:
        return f"{self.path}:{self.tag}"


def as_part(text: str) -> str:
    """Return `text` as a part of a name: what cannot stand in one becomes "-"."""
    part = re.sub(r"[^A-Za-z0-9_.\-]", "-", text)[:96].lstrip(".-")
    return part or "model"
