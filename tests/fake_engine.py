"""The engine that tests of the server are made with, by the names that they know it under."""

from __future__ import annotations

from nexus_ext.testing.scripted import (
    CHAT_TEMPLATE,
    FIRST_BYTE,
    N_VOCAB,
    Script,
    by_bytes,
    decode,
    encode,
)
from nexus_ext.testing.scripted import ScriptedEngine as FakeEngine

__all__ = [
    "CHAT_TEMPLATE",
    "FIRST_BYTE",
    "N_VOCAB",
    "FakeEngine",
    "Script",
    "by_bytes",
    "decode",
    "encode",
]
