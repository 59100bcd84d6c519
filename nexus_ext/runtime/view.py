"""A GGUF for another program, of a model that is stored otherwise: the header and a hole.

The program opens this file; the weights, for which it only has a hole, are read by the backend from
the NXF (native/include/nexus_view.h). Until the backend is in the program the file ends behind the
header, so that without it llama.cpp refuses the file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nexus_ext.errors import UsageError
from nexus_ext.hardware.mounts import MEMORY_FILESYSTEMS, mount_of, read_mounts
from nexus_ext.hardware.system import System
from nexus_ext.types import Catalog


@contextlib.contextmanager
def view_of(catalog: Catalog) -> Iterator[Path]:
    """Yield the path of a view of `catalog`, which is gone after the block.

    Raises UsageError where no directory on a disk can be written to.
    """
    model = Path(catalog.files[0].path)
    with tempfile.TemporaryDirectory(prefix="nexus-view-", dir=_folder(model)) as folder:
        path = Path(folder, model.stem + ".gguf")
        offsets = zip(catalog.tensors, catalog.virtual_offsets, strict=True)
        begin = min((o for t, o in offsets if t.nbytes), default=catalog.virtual_nbytes)
        with open(path, "wb") as file:
            file.write(catalog.header)
            file.truncate(begin)
        yield path


def _folder(model: Path) -> str:
    """Return a directory on a disk: in memory, a mapping of the hole would take what it hides."""
    mounts = read_mounts(System())
    tried = []
    for folder in (tempfile.gettempdir(), str(model.parent), "/var/tmp", str(Path.home())):
        real = os.path.realpath(folder)
        mount = mount_of(real, mounts)
        if mount is not None and mount.filesystem in MEMORY_FILESYSTEMS:
            tried.append(f"{real} ({mount.filesystem})")
        elif os.access(real, os.W_OK):
            return real
        else:
            tried.append(f"{real} (not writable)")
    raise UsageError(
        f"{model} needs a small file on a disk for the program to open; tried {', '.join(tried)}",
        hint="name a directory on a disk in TMPDIR",
    )


def with_view(command: Sequence[str], model: str, view: Path) -> list[str]:
    """Return `command` with `view` in place of the path of the model.

    Raises UsageError when no argument is that path.
    """
    words = [_replaced(word, model, str(view)) for word in command[1:]]
    if words == list(command[1:]):
        raise UsageError(
            f"no argument of {command[0]} is {model}, and a program has to be given another file "
            "in the place of an NXF",
            hint="name the model in the program's arguments as in --model",
        )
    return [command[0], *words]


def _replaced(word: str, model: str, view: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and _same(value, model):
        return f"{option}={view}"
    return view if _same(word, model) else word


def _same(path: str, model: str) -> bool:
    return path == model or (os.path.exists(path) and os.path.samefile(path, model))
