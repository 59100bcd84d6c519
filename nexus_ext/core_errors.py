"""What the native core says went wrong, as errors: by status, with the words and numbers of C."""

from __future__ import annotations

import os
from typing import Any

import nexus_ext._native as _native
from nexus_ext.errors import (
    BackendUnavailable,
    FormatError,
    Interrupted,
    ModelChanged,
    ModelClosed,
    NexusError,
    OutOfMemory,
    ReadFailed,
    UsageError,
)

ffi = _native.ffi
lib = _native.lib


def text_of(array: Any) -> str:
    """Return the text in an array of char."""
    raw: bytes = ffi.string(array)
    return raw.decode("utf-8", "replace")


def error_of(error: Any, what: str) -> NexusError:
    """Return the exception for a filled-in `nx_error`."""
    text = text_of(error.text) or text_of(lib.nx_status_text(error.status))
    path, tensor, code = text_of(error.path), text_of(error.tensor), int(error.sys_errno)
    if error.status in (lib.NX_E_TRUNCATED, lib.NX_E_CHANGED):
        return ModelChanged(
            f"{what}: {text} ({path}, offset {error.offset})",
            hint="the file is not what it was when it was opened; open it again",
            path=path,
            offset=error.offset,
            errno=code,
        )
    if error.status == lib.NX_E_IO:
        reason = os.strerror(code) if code else "read error"
        return ReadFailed(
            f"{what}: cannot read {error.nbytes} bytes of tensor {tensor} "
            f"at offset {error.offset} of {path}: {reason}"
            if tensor
            else f"{what}: {text}",
            hint="check the disk and the file; the next call tries again",
            path=path,
            offset=error.offset,
            errno=code,
        )
    kinds: dict[int, tuple[type[NexusError], str]] = {
        lib.NX_E_NOMEM: (OutOfMemory, "give the model less, or the process more memory"),
        lib.NX_E_ABORTED: (Interrupted, ""),
        lib.NX_E_CLOSED: (ModelClosed, "open the model again"),
        lib.NX_E_INVALID: (FormatError, ""),
        lib.NX_E_DAMAGED: (FormatError, "convert or download the model again"),
        lib.NX_E_UNSUPPORTED: (UsageError, ""),
        lib.NX_E_ABI: (BackendUnavailable, ""),
    }
    kind, hint = kinds.get(error.status, (NexusError, ""))
    where = f" ({path})" if path and path not in text else ""
    return kind(f"{what}: {text}{where}", hint=hint)


def check(status: int, what: str) -> None:
    """Raise the error that `status` stands for, if it is one."""
    if status == lib.NX_OK:
        return
    error = ffi.new("nx_error *")
    error.status = status
    raise error_of(error, what)
