"""llama.cpp's quantizer, in a process of its own.

A GGUF of floats goes in, a quantized one comes out. The quantizer aborts the process on input that
it does not like and cannot be interrupted; a child process can do both without harm. Run as a
module, this is that child.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nexus_ext.errors import NexusError, UsageError, WriteFailed
from nexus_ext.formats.new_file import check_space, refuse_existing

# Name -> bits of a weight in its main type. Types that need an importance matrix are not here.
QUANT_BITS = {
    "q8_0": 8.5,
    "q6_k": 6.5625,
    "q5_k_m": 5.5,
    "q5_k_s": 5.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_k_m": 4.5,
    "q4_k_s": 4.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
    "iq4_xs": 4.25,
    "q3_k_l": 3.4375,
    "q3_k_m": 3.4375,
    "q3_k_s": 3.4375,
    "iq3_m": 3.4375,
    "iq3_s": 3.4375,
    "q2_k": 2.625,
    "tq2_0": 2.0625,
    "tq1_0": 1.6875,
}
TERNARY_TYPES = ("tq1_0", "tq2_0")

# The mixtures keep some tensors (embedding, output) in larger types: room for those.
_MIXTURE = 1.3
_BUFFER_NBYTES = 512 << 20  # rows that the quantizer holds at once; its default is 8 GiB
_POLL_S = 0.1
_STDERR_LINES = 12
_FALLBACK = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback quantization")

Progress = Callable[[int, int], None]


class QuantizationFailed(NexusError, RuntimeError):
    """llama.cpp's quantizer gave up; the message has its last words."""

    code = "quantization_failed"


def quantized_nbytes(float_nbytes: int, float_bits: int, type_name: str) -> int:
    """Return about how large a file of floats will be once it is quantized."""
    return int(float_nbytes * QUANT_BITS[type_name] / float_bits * _MIXTURE)


def quantize(
    source: str,
    target: str,
    type_name: str,
    *,
    n_threads: int = 0,
    overwrite: bool = False,
    expected_nbytes: int = 0,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the GGUF `source` (floats) to `target` with weights of `type_name`; return notes.

    `target` appears when it is complete. `n_threads` 0 takes one a core. Raises UsageError for an
    unknown type or a target that exists, WriteFailed without space, QuantizationFailed otherwise.
    """
    if type_name not in QUANT_BITS:
        raise UsageError(
            f"the type is {type_name!r}, not one of {', '.join(QUANT_BITS)}",
            hint="Types that need an importance matrix are not made here.",
        )
    refuse_existing(target, overwrite=overwrite)
    check_space(os.path.dirname(os.path.abspath(target)), expected_nbytes)
    part = target + ".part"
    command = [sys.executable, "-m", "nexus_ext.runtime.quantizer"]
    command += [os.path.abspath(source), os.path.abspath(part), type_name, str(n_threads)]
    try:
        status, said = _run(command, part, expected_nbytes, progress)
        if status:
            raise _failure(source, target, status, said)
        _sync(part)
        refuse_existing(target, overwrite=overwrite)
        os.replace(part, target)
    except OSError as error:
        if isinstance(error, NexusError):
            raise
        raise WriteFailed(
            f"{target}: cannot be written: {error.strerror}", path=target, errno=error.errno or 0
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
    fallback = _FALLBACK.search(said)
    if fallback is None:
        return ()
    return (
        f"{fallback[1]} tensors have rows that do not fill the blocks of {type_name}; llama.cpp "
        "gave them a larger type",
    )


def _run(
    command: list[str], part: str, expected_nbytes: int, progress: Progress | None
) -> tuple[int, str]:
    """Run the child to its end; return its exit status and what it said."""
    # A directory of its own: `-m` looks into the working directory for modules first.
    with tempfile.TemporaryDirectory(prefix="nexus-") as cwd, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, cwd=cwd
        )
        try:
            while True:
                try:
                    child.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if progress is not None and os.path.exists(part):
                        done = os.path.getsize(part)
                        progress(done, max(done, expected_nbytes))
        except BaseException:
            child.kill()
            child.wait()
            raise
        said.seek(0)
        return child.returncode, said.read().decode("utf-8", "replace")


def _failure(source: str, target: str, status: int, said: str) -> NexusError:
    how = f"with status {status}"
    if status < 0:
        how = f"by signal {-status} ({signal.strsignal(-status)})"
    last = "\n".join(said.strip().splitlines()[-_STDERR_LINES:])
    return QuantizationFailed(
        f"quantizing {source} to {target} ended {how}" + (f":\n{last}" if last else ""),
        hint="Is there enough space and memory? Without --type the weights stay as they are.",
    )


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- the child ------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Quantize (source, target, type, threads) and return llama.cpp's status."""
    import llama_cpp

    source, target, type_name, n_threads = arguments
    bindings: Any = llama_cpp
    params = bindings.llama_model_quantize_default_params()
    params.ftype = getattr(bindings, f"LLAMA_FTYPE_MOSTLY_{type_name.upper()}")
    params.nthread = int(n_threads)
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = _BUFFER_NBYTES
    return int(bindings.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
