"""Sensitivities that were measured before, so that another size of a model costs no new measuring.

One small file for each model, importance, text and way of measuring, beside the hardware profiles.
A file that cannot be read or understood is as good as none, and one that cannot be written costs a
new measurement next time: both are logged, neither is an error.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import xxhash

from nexus_ext.errors import FormatError
from nexus_ext.formats.new_file import replace_whole
from nexus_ext.hardware.cache import default_cache_dir
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime.sensitivity import Sensitivity
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import TensorInfo

_log = logging.getLogger("nexus_ext.runtime")

VERSION: Final = 1
MOST_BYTES: Final = 64 << 20  # of a file


def sensitivity_file(
    weights: Weights,
    tensors: Collection[TensorInfo],
    imatrix: ImportanceMatrix,
    text: bytes,
    *settings: object,
) -> str:
    """Return the path of the file for what is measured like this; it may not exist yet.

    The model is told by its header and the first row of every tensor. `settings` is all else that
    the numbers depend on.
    """
    digest = xxhash.xxh3_128(weights.catalog.fingerprint.encode())
    for tensor in tensors:
        digest.update(weights.first_row(tensor))
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(entry.sums).tobytes())
        digest.update(np.ascontiguousarray(entry.counts).tobytes())
    digest.update(xxhash.xxh3_128(text).digest())
    digest.update(repr(settings).encode())
    directory = default_cache_dir(os.environ, os.path.expanduser("~"))
    return os.path.join(directory, f"sensitivity-{digest.hexdigest()}.json")


def load(file: str, names: Collection[str]) -> dict[str, Sensitivity] | None:
    """Return what was measured of these tensors; None when the file is absent or broken."""
    try:
        if os.path.getsize(file) > MOST_BYTES:
            raise FormatError(f"{file} is larger than any sensitivities", hint="remove it")
        with open(file, encoding="utf-8") as stream:
            return _parsed(stream.read(), file, names)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, FormatError) as error:
        _log.warning("the stored sensitivities are ignored: %s", error)
        return None


def _parsed(text: str, file: str, names: Collection[str]) -> dict[str, Sensitivity]:
    try:
        fields = json.loads(text)
        if fields["nexus_sensitivity"] != VERSION:
            raise ValueError(f"its version is {fields['nexus_sensitivity']!r}, this is {VERSION}")
        found = {
            str(name): Sensitivity(
                {str(kind): _number(error) for kind, error in entry["errors"].items()},
                _number(entry["divergence_per_error"]),
            )
            for name, entry in fields["tensors"].items()
        }
        if set(found) != set(names):
            raise ValueError("it is of other tensors")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{file} holds no sensitivities: {error}", hint="it is replaced when it can"
        ) from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no error and no divergence")
    return float(value)


def store(file: str, sensitivities: Mapping[str, Sensitivity]) -> bool:
    """Write the file and return whether that worked."""
    tensors = {
        name: {"errors": dict(s.errors), "divergence_per_error": s.divergence_per_error}
        for name, s in sensitivities.items()
    }
    text = json.dumps({"nexus_sensitivity": VERSION, "tensors": tensors})
    try:
        replace_whole(file, text.encode())
    except OSError as error:
        _log.warning("the sensitivities are not stored, the next run measures again: %s", error)
        return False
    return True
