"""What Ollama's clients are told of a model: sizes, families, quantization, capabilities."""

from __future__ import annotations

import functools
import os
from collections import Counter
from contextlib import suppress
from typing import Any

from nexus_ext.errors import NexusError
from nexus_ext.formats import open_model
from nexus_ext.server.ollama_common import timestamp
from nexus_ext.store import StoredModel
from nexus_ext.types import Catalog

_MAX_VALUE = 100  # of metadata: longer lists and texts are not repeated to every client


@functools.lru_cache(maxsize=256)
def _opened(path: str, size: int, modified_ns: int) -> Catalog:
    return open_model(path)


def catalog_of(model: StoredModel) -> Catalog:
    """Return the header of a model's file, read again when the file is another one.

    Raises FormatError, ReadFailed.
    """
    try:
        status = os.stat(model.path)
    except OSError:
        return open_model(model.path)  # which says what is wrong
    return _opened(model.path, status.st_size, status.st_mtime_ns)


def n_parameters(catalog: Catalog) -> int:
    total = 0
    for tensor in catalog.tensors:
        n = 1
        for extent in tensor.shape:
            n *= extent
        total += n
    return total


def details(model: StoredModel) -> dict[str, Any]:
    """Return format, family, number of parameters and quantization; blanks if unreadable."""
    try:
        catalog = catalog_of(model)
    except (NexusError, OSError):
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "",
            "families": [],
            "parameter_size": "",
            "quantization_level": "",
        }
    family = catalog.shape.architecture
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": _count(n_parameters(catalog)),
        "quantization_level": _quantization(catalog),
    }


def _quantization(catalog: Catalog) -> str:
    """Return what the file says of itself, else the type that most of its bytes have."""
    said = catalog.metadata.get("general.file_type")
    if isinstance(said, int):
        from gguf import LlamaFileType

        with suppress(ValueError):  # a newer one than this version of gguf knows
            return LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    nbytes: Counter[str] = Counter()
    for tensor in catalog.tensors:
        nbytes[tensor.type_name] += tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else ""


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def listed(model: StoredModel) -> dict[str, Any]:
    """Return a model as /api/tags lists it."""
    return {
        "name": str(model.name),
        "model": str(model.name),
        "modified_at": timestamp(model.modified_s),
        "size": model.nbytes,
        "digest": model.digest,
        "details": details(model),
    }


def model_info(catalog: Catalog, verbose: bool) -> dict[str, Any]:
    """Return the metadata of a file; long values only when asked for."""
    info: dict[str, Any] = {"general.parameter_count": n_parameters(catalog)}
    for key, value in catalog.metadata.items():
        if isinstance(value, (str, int, float, bool)):
            short = verbose or not isinstance(value, str) or len(value) <= _MAX_VALUE
            info[key] = value if short else None
        else:
            info[key] = None  # arrays are known by their size only
    return info


def parameter_lines(model: StoredModel) -> str:
    """Return parameters as a Modelfile has them, one a line."""
    lines = []
    for name, value in model.parameters.items():
        for each in value if isinstance(value, list) else [value]:
            shown = f'"{each}"' if isinstance(each, str) else f"{each:g}"
            lines.append(f"{name:<30} {shown}")
    return "\n".join(lines)
