"""The process that quantizes: one job as JSON on stdin, events as lines of JSON on stdout.

llama.cpp reports progress and errors through its log alone, so the log is read here.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import IO, Any

from nexus_ext.runtime.quantize import QuantizeJob

_BUFFER_BYTES = 512 << 20  # rows that the quantizer holds at once; its default is 8 GiB
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")
_TYPE = re.compile(r"size = .* -> .* MiB \((\w+)\)")
_FALLBACK = re.compile(r"warning:\s+(\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+)")


class Log:
    """Turns the log into events; keeps the last error."""

    def __init__(self, channel: IO[str]) -> None:
        self.channel = channel
        self.error = ""
        self._tensor = ""  # the last one that was named

    def write(self, text: str) -> None:
        if match := _PROGRESS.search(text):
            self._tensor = match[3]
            self.event(done=int(match[1]), total=int(match[2]), tensor=match[3])
        elif match := _TYPE.search(text):
            self.event(tensor=self._tensor, type=match[1])
        elif match := _FALLBACK.search(text):
            self.event(fallback=f"{match[1]}: rows of {match[2]}, not a multiple of {match[3]}")
        elif "failed to quantize" in text or " ERROR: " in text:
            self.error = text.strip().removeprefix("llama_model_quantize: failed to quantize: ")

    def event(self, **fields: Any) -> None:
        self.channel.write(json.dumps(fields) + "\n")
        self.channel.flush()


def work(job: QuantizeJob, log: Log) -> str | None:
    """Do the job; return why it failed, or None."""
    import llama_cpp.llama_cpp as bindings

    def heard(level: int, text: bytes, _: Any) -> None:
        log.write(text.decode("utf-8", "replace"))

    callback: Any = bindings.llama_log_callback
    kept_callback = callback(heard)
    bindings.llama_log_set(kept_callback, ctypes.c_void_p(0))
    params = bindings.llama_model_quantize_default_params()
    name = job.file_type.upper()
    params.ftype = getattr(bindings, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = job.n_threads
    params.allow_requantize = job.allow_requantize
    params.dry_run = job.dry_run
    params.max_buf_size = _BUFFER_BYTES
    keep: list[Any] = []  # what the parameters point to
    if job.types:
        overrides = (bindings.llama_model_tensor_override * (len(job.types) + 1))()
        for slot, (tensor, number) in zip(overrides, job.types.items(), strict=False):
            slot.pattern = f"^{_escaped(tensor)}$".encode()
            slot.type = number
        keep.append(overrides)
        params.tt_overrides = overrides
    if job.imatrix is not None:
        entries = _importance(bindings, job.imatrix, keep)
        params.imatrix = entries
    status = bindings.llama_model_quantize(job.source.encode(), job.target.encode(), params)
    del keep
    return None if status == 0 else log.error or "llama.cpp does not say why"


def _escaped(tensor: str) -> str:
    """Escape a name for std::regex, whose syntax is that of ECMAScript."""
    return re.sub(r"([.*+?^${}()|\[\]\\/])", r"\\\1", tensor)


def _importance(bindings: Any, path: str, keep: list[Any]) -> Any:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        entries = (bindings.llama_model_imatrix_data * (len(arrays.files) + 1))()
        for slot, tensor in zip(entries, arrays.files, strict=False):
            values = np.ascontiguousarray(arrays[tensor], np.float32)
            keep.append(values)
            slot.name = tensor.encode()
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            slot.size = values.size
    keep.append(entries)
    return entries


def main() -> int:
    # llama.cpp prints to stdout as well, which belongs to the events.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        log = Log(channel)
        job = QuantizeJob(**json.load(sys.stdin))
        log.event(failed=work(job, log))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
