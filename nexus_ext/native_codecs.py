"""Codecs of plugins, given to the threads of the core that decode chunks of streamed weights.

A codec that has a struct in C (its attribute `native`, a NativePolicy of an `nxp_codec`) is called
without Python. Any other is called through a struct of ours, which takes the interpreter's lock
for each chunk; when the interpreter ends, nobody is let in any more.
"""

from __future__ import annotations

import atexit
import logging
import threading
from typing import Any

import nexus_ext._native as _native
from nexus_ext.codecs import Codec
from nexus_ext.core_errors import text_of
from nexus_ext.errors import FormatError, OutOfMemory, PluginError
from nexus_ext.policies.native import NativePolicy

ffi = _native.ffi
lib = _native.lib

_log = logging.getLogger("nexus_ext.plugins")
_lock = threading.Lock()


class _Holder:
    """A codec in Python behind a struct: one for each name, whatever objects come and go."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.name, self.handle = ffi.new("char[]", codec.name.encode()), ffi.new_handle(self)
        self.struct = ffi.new("nxp_codec *")
        size = ffi.sizeof("nxp_codec")
        self.struct.head = (size, lib.NXP_API_VERSION, lib.NXP_CODEC, 0, self.name)
        self.struct.user = self.handle
        self.struct.decode = lib.nx_python_decode


_kept: dict[int, object] = {}  # address of a struct -> what must stay for it
_python: dict[str, _Holder] = {}


def register_codec(codec: Codec, *, in_python: bool = False) -> None:
    """Let the core decode chunks of `codec` in the models that are opened from now on.

    By its struct in C, if it has one, unless `in_python`. PluginError when the struct is not one of
    this version, or names another codec.
    """
    native = None if in_python else native_of(codec)
    with _lock:
        if native is not None:
            struct = ffi.cast("const nxp_codec *", native.address)
        else:
            holder = _python.setdefault(codec.name, _Holder(codec))
            holder.codec, struct = codec, holder.struct
        error = ffi.new("nx_error *")
        status = lib.nx_codec_register(struct, native is None, error)
        text = text_of(error.text)
        if status in (lib.NX_E_ABI, lib.NX_E_INVALID):
            raise PluginError(
                f"codec {codec.name!r}: {text}", hint="see plugins/docs/c-policies.md"
            )
        if status != lib.NX_OK:
            raise OutOfMemory(f"codec {codec.name!r}: {text}")
        if native is not None:
            _kept[native.address] = native.keepalive  # until the process ends
        name = text_of(struct.head.name)
        if name != codec.name:
            raise PluginError(
                f"codec {codec.name!r}: its struct in C has the name {name!r}",
                hint="give both the name that files have",
            )


def native_of(codec: Codec) -> NativePolicy | None:
    """Return the struct in C that a codec has, if it has one."""
    native = getattr(codec, "native", None)
    return native if isinstance(native, NativePolicy) else None


def decode_natively(codec: Codec, stored: bytes, raw_nbytes: int) -> bytes | None:
    """Return what the struct in C makes of `stored`; None when the codec has none.

    FormatError when it finds no encoding of so many bytes.
    """
    native = native_of(codec)
    if native is None:
        return None
    struct = ffi.cast("const nxp_codec *", native.address)
    out = ffi.new("uint8_t[]", raw_nbytes)
    if struct.decode(struct.user, ffi.from_buffer(stored), len(stored), out, raw_nbytes):
        raise FormatError(f"{codec.name}: {len(stored)} bytes are no encoding of {raw_nbytes}")
    return bytes(ffi.buffer(out, raw_nbytes))


@ffi.def_extern(error=-1, onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_decode(user: Any, stored: Any, stored_nbytes: int, raw: Any, raw_nbytes: int) -> int:
    holder: _Holder = ffi.from_handle(user)
    codec = holder.codec
    try:
        codec.decode(
            memoryview(ffi.buffer(stored, stored_nbytes)).toreadonly(),
            memoryview(ffi.buffer(raw, raw_nbytes)),
        )
    except FormatError:
        return 1
    except BaseException:  # must not unwind through C
        _log.exception("codec %r raised while decoding", codec.name)
        return -1
    return 0


# A thread that asked for the interpreter's lock now would never return, and be waited for.
atexit.register(lib.nx_codec_gate, 0)
