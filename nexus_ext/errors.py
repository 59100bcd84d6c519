"""Every error nexus_ext raises, in one tree.

Each class has a stable `code` (for JSON output and HTTP bodies) and an `exit_status` (for the
command line). Each error carries a `hint`: the one thing the user can do about it. Classes also
inherit the builtin exception that callers who do not know nexus_ext would expect.
"""

from __future__ import annotations


class NexusError(Exception):
    """Base of all errors of nexus_ext. `str(error)` is one sentence; `error.hint` is the fix."""

    code = "nexus_error"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(NexusError, ValueError):
    """An argument has a value that cannot be used."""

    code = "usage"
    exit_status = 2


class FormatError(NexusError, ValueError):
    """A model file breaks its format. The message names the file, the offset and the value."""

    code = "format"


class ModelNotFound(NexusError, LookupError):
    """A request names a model that there is not. Never answered by another model."""

    code = "model_not_found"


class DoesNotFit(NexusError, MemoryError):
    """No placement keeps to the budget. `smallest_bytes` is the smallest budget that would do."""

    code = "does_not_fit"
    exit_status = 3

    def __init__(self, message: str, *, hint: str = "", smallest_bytes: int) -> None:
        super().__init__(message, hint=hint)
        self.smallest_bytes = smallest_bytes


class BackendUnavailable(NexusError, RuntimeError):
    """The llama.cpp runtime cannot take the NEXUS backend (absent, or of another ABI)."""

    code = "backend_unavailable"


class ReadFailed(NexusError, OSError):
    """A weight could not be read. `path`, `offset` and `errno` say where and why."""

    code = "read_failed"

    def __init__(
        self, message: str, *, hint: str = "", path: str = "", offset: int = 0, errno: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.offset = offset
        self.errno = errno


class WriteFailed(NexusError, OSError):
    """A file could not be written, for lack of space for instance: `path` and `errno` say why."""

    code = "write_failed"

    def __init__(self, message: str, *, hint: str = "", path: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.errno = errno


class ModelChanged(ReadFailed):
    """The model file was truncated or overwritten while it was in use."""

    code = "model_changed"


class OutOfMemory(NexusError, MemoryError):
    """Memory for weights or for their pool could not be had."""

    code = "out_of_memory"


class ModelClosed(NexusError, RuntimeError):
    """A model was used after `close()`."""

    code = "model_closed"


class Interrupted(NexusError):
    """The computation was stopped by the user or by an abort callback."""

    code = "interrupted"
    exit_status = 130


class OutputDiffers(NexusError):
    """Streamed and resident runs of one model do not agree bit by bit."""

    code = "output_differs"


class PluginError(NexusError, RuntimeError):
    """A plugin could not be imported or registered, or nobody at all answers a hook."""

    code = "plugin"


class Damaged(FormatError):
    """Stored bytes are not those that were written. Says which tensor, chunk and offset."""

    code = "damaged"

    def __init__(
        self, message: str, *, hint: str = "", path: str, item: str, chunk: int, offset: int
    ) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.item = item  # a tensor, a section, or "" for bytes that belong to none
        self.chunk = chunk  # of the item; -1 outside of chunks
        self.offset = offset  # in the file at `path`
