"""Write `_native.c`, the CFFI module, from the declarations in this directory.

Run it after every change of a declaration and commit the result:

    python nexus_ext/native/cffi/build.py

Each `NN_area.h` holds the declarations of one public header, as CFFI understands them. Its
`#include` lines are not declarations: they go to the C file, so that the compiler checks every
declaration against the real header. The files are joined in the order of their names.

Building the package needs neither this script nor cffi: the result is committed, and a test fails
when it is not what this script writes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = "nexus_ext._native"
OUTPUT = HERE / "_native.c"


def declarations(directory: Path = HERE) -> tuple[str, str]:
    """Return (what the C file includes, what CFFI declares), joined over all `*.h`."""
    includes: list[str] = []
    cdef: list[str] = []
    for path in sorted(directory.glob("*.h")):
        for line in path.read_text(encoding="utf-8").splitlines():
            (includes if line.startswith("#include") else cdef).append(line)
    return "\n".join(includes) + "\n", "\n".join(cdef) + "\n"


def generator_line(directory: Path = HERE) -> str:
    """Name what a `_native.c` was made of: the first line of the file."""
    import cffi

    return f"/* Written by build.py with cffi {cffi.__version__} from {digest(directory)}. */"


def digest(directory: Path = HERE) -> str:
    """Return the SHA-256 of the declarations, which does not depend on the version of cffi."""
    return hashlib.sha256("\0".join(declarations(directory)).encode()).hexdigest()


def generate(directory: Path = HERE) -> str:
    """Return the text of `_native.c`."""
    from cffi import FFI

    includes, cdef = declarations(directory)
    ffi = FFI()
    ffi.cdef(cdef)
    ffi.set_source(MODULE, includes)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "_native.c"
        with contextlib.redirect_stdout(sys.stderr):  # cffi prints what it writes
            ffi.emit_c_code(str(path))
        return f"{generator_line(directory)}\n{path.read_text(encoding='utf-8')}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the CFFI module.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    arguments = parser.parse_args()
    text = generate()
    if OUTPUT.exists() and OUTPUT.read_text(encoding="utf-8") == text:
        return 0
    if arguments.check:
        sys.stderr.write(f"{OUTPUT.name} is out of date: run {Path(__file__).name}\n")
        return 1
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
