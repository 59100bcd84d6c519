"""A quantized model as an NXF, with what belongs to it as sections.

llama.cpp's quantizer writes a GGUF; it lies beside the target until the NXF is complete, so the
disk has room for both or the conversion does not begin.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from nexus_ext.errors import UsageError
from nexus_ext.formats.new_file import refuse_existing
from nexus_ext.formats.nxf_convert import Progress, Report, to_nxf
from nexus_ext.formats.sections import WithSections
from nexus_ext.formats.sources import open_source


def is_nxf_name(path: str) -> bool:
    return path.lower().endswith(".nxf")


@contextlib.contextmanager
def place_for_gguf(target: str, *, overwrite: bool = False) -> Iterator[str]:
    """Yield where the GGUF goes that becomes the NXF `target`; it is gone after the block.

    Raises UsageError when `target` may not be written.
    """
    refuse_existing(target, overwrite=overwrite)
    path = Path(target).absolute()
    if not path.parent.is_dir():
        raise UsageError(
            f"{target}: the directory {path.parent} does not exist", hint="Create it first."
        )
    # Under a name that the next attempt finds: a kill leaves it behind.
    folder = path.with_name(f".{path.name}.quantize")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{target}: another process is writing it", hint="Wait until it is done."
            ) from None
        for left in folder.iterdir():
            left.unlink()
        try:
            yield str(folder / (path.stem + ".gguf"))
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def pack(
    gguf: str,
    target: str,
    sections: Mapping[str, str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write `gguf` as the NXF `target`, with the files in `sections` (name -> path) as sections.

    Raises what `to_nxf` raises.
    """
    source = WithSections(open_source(gguf), sections)
    try:
        return to_nxf(source, target, overwrite=overwrite, progress=progress)
    finally:
        source.close()
