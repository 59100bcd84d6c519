"""Models by name: a store of our own, and those of Ollama and LM Studio read where they are.

Files and names only: nothing here loads a model or knows of servers.
"""

from __future__ import annotations

from nexus_ext.store.library import Library, default_root
from nexus_ext.store.model import ModelSource, StoredModel
from nexus_ext.store.names import ModelName

__all__ = ["Library", "ModelName", "ModelSource", "StoredModel", "default_root"]
