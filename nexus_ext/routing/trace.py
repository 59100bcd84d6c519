"""A routing trace: which experts each token used in each layer, with a compact binary form.

The form, version 1, little-endian:

    "NXTRACE\\0"    magic
    u32 version, u32 n: the length of the header
    header          n bytes of JSON: what `RoutingTrace` holds, without the decisions
    u32 x n_passes  tokens of each pass (what was computed at once: a batch, or one token)
    per layer       n_tokens x n_used numbers of experts, one byte each up to 256 experts, else two
    u64             xxh3-64 of everything before

Nothing here reads files or knows where decisions come from.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nexus_ext.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

MAGIC: Final = b"NXTRACE\0"
VERSION: Final = 1
MAX_EXPERTS: Final = 1 << 16
_HEAD: Final = struct.Struct("<8sII")
_SUM: Final = struct.Struct("<Q")
_HINT: Final = "record the trace again with `nexus trace`"


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """The experts of one layer, and who used them."""

    layer: int
    n_experts: int
    n_used: int  # experts a token
    record_bytes: int  # of one expert: gate, up and down
    slot_bytes: int  # of memory that the cache takes for one
    experts: bytes  # (n_tokens, n_used) numbers of `width` bytes, little-endian

    @property
    def width(self) -> int:
        return 1 if self.n_experts <= 256 else 2

    def numbers(self) -> Numbers:
        """Return the decisions as an array: (n_tokens, n_used)."""
        import numpy as np

        return np.frombuffer(self.experts, f"<u{self.width}").reshape(-1, self.n_used)


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Decisions of the routers of one model over one text."""

    fingerprint: str  # of the model: Catalog.fingerprint
    architecture: str
    passes: tuple[int, ...]  # tokens that were computed at once, in order
    layers: tuple[TracedLayer, ...]
    # Of the machine and the model that the trace was recorded with; 0 when not known.
    disk_bytes_s: float = 0.0  # random reads of one record
    compute_s: float = 0.0  # computing a decoded token

    @property
    def n_tokens(self) -> int:
        return sum(self.passes)

    @property
    def token_bytes(self) -> int:
        """Bytes of all experts that one token uses: one token's cycle."""
        return sum(layer.n_used * layer.record_bytes for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.n_experts * layer.record_bytes for layer in self.layers)

    def to_bytes(self) -> bytes:
        """Return the binary form, which `from_bytes` reads back to an equal trace."""
        header = {
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "n_passes": len(self.passes),
            "n_tokens": self.n_tokens,
            "disk_bytes_s": self.disk_bytes_s,
            "compute_s": self.compute_s,
            "layers": [{name: getattr(layer, name) for name in _COUNTS} for layer in self.layers],
        }
        text = json.dumps(header, allow_nan=False).encode()
        parts = [_HEAD.pack(MAGIC, VERSION, len(text)), text]
        parts.append(struct.pack(f"<{len(self.passes)}I", *self.passes))
        parts += [layer.experts for layer in self.layers]
        body = b"".join(parts)
        return body + _SUM.pack(_checksum(body))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "trace") -> RoutingTrace:
        """Return the trace in `data`. FormatError names `source` and what is wrong with it."""
        return _Reader(data, source).trace()


_COUNTS: Final = {  # of a layer in the header: name -> (lowest, highest)
    "layer": (0, 1 << 20),
    "n_experts": (1, MAX_EXPERTS),
    "n_used": (1, MAX_EXPERTS),
    "record_bytes": (1, 1 << 48),
    "slot_bytes": (1, 1 << 48),
}
_FIELDS: Final = frozenset(
    (
        *("fingerprint", "architecture", "n_passes", "n_tokens"),
        *("disk_bytes_s", "compute_s", "layers"),
    )
)


def _checksum(data: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


class _Reader:
    """Reads one file and refuses all that `to_bytes` would not have written."""

    def __init__(self, data: bytes, source: str) -> None:
        self._data, self._source = data, source
        self._at = _HEAD.size

    def trace(self) -> RoutingTrace:
        fields = self._header()
        n_passes = self._count("n_passes", fields["n_passes"], 0, 1 << 32)
        n_tokens = self._count("n_tokens", fields["n_tokens"], 0, 1 << 40)
        passes = struct.unpack(f"<{n_passes}I", self._take(4 * n_passes, "passes"))
        if 0 in passes:
            raise self._error("passes", "have one of no tokens")
        if sum(passes) != n_tokens:
            raise self._error("n_tokens", f"is {n_tokens}, the passes have {sum(passes)}")
        entries = fields["layers"]
        if not isinstance(entries, list):
            raise self._error("layers", "is not a list")
        layers = tuple(self._layer(entry, n_tokens) for entry in entries)
        if [layer.layer for layer in layers] != sorted({layer.layer for layer in layers}):
            raise self._error("layers", "are not in order")
        if self._at != len(self._data) - _SUM.size:
            raise self._error("length", f"is {len(self._data)}, the header says less")
        return RoutingTrace(
            fingerprint=self._text("fingerprint", fields["fingerprint"]),
            architecture=self._text("architecture", fields["architecture"]),
            passes=passes,
            layers=layers,
            disk_bytes_s=self._rate("disk_bytes_s", fields["disk_bytes_s"]),
            compute_s=self._rate("compute_s", fields["compute_s"]),
        )

    def _header(self) -> dict[str, Any]:
        data = self._data
        if len(data) < _HEAD.size + _SUM.size:
            raise self._error("length", f"is {len(data)}, less than any trace has")
        magic, version, length = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise self._error("start", f"is {magic!r}, not {MAGIC!r}: this is no trace")
        if version != VERSION:
            raise self._error("version", f"is {version}, not {VERSION}")
        (expected,) = _SUM.unpack_from(data, len(data) - _SUM.size)
        if _checksum(data[: -_SUM.size]) != expected:
            raise self._error("checksum", "is wrong: the file is cut off or damaged")
        try:
            fields = json.loads(self._take(length, "header"), parse_constant=self._constant)
        except (ValueError, RecursionError) as error:
            if isinstance(error, FormatError):
                raise
            raise self._error("header", f"is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.keys() != _FIELDS:
            raise self._error("header", "does not have the fields of a trace")
        return fields

    def _layer(self, entry: object, n_tokens: int) -> TracedLayer:
        if not isinstance(entry, dict) or entry.keys() != _COUNTS.keys():
            raise self._error("layers", "have other fields than a trace")
        counts = {name: self._count(name, entry[name], *_COUNTS[name]) for name in _COUNTS}
        layer = TracedLayer(**counts, experts=b"")
        if layer.n_used > layer.n_experts:
            raise self._error("n_used", f"is {layer.n_used} of {layer.n_experts} experts")
        size = n_tokens * layer.n_used * layer.width
        found = TracedLayer(**counts, experts=self._take(size, f"layer {layer.layer}"))
        if n_tokens and int(found.numbers().max()) >= layer.n_experts:
            most = int(found.numbers().max())
            raise self._error(f"layer {layer.layer}", f"uses expert {most} of {layer.n_experts}")
        return found

    def _take(self, size: int, what: str) -> bytes:
        end = self._at + size
        if end > len(self._data) - _SUM.size:
            raise self._error(what, f"ends at {end}, the file has {len(self._data)} bytes")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _count(self, name: str, value: object, lowest: int, highest: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(name, f"is {value!r}, not a whole number")
        if not lowest <= value <= highest:
            raise self._error(name, f"is {value}, not {lowest} to {highest}")
        return value

    def _rate(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._error(name, f"is {value!r}, not a number")
        if not (0 <= value < 1e18 and math.isfinite(value)):
            raise self._error(name, f"is {value!r}, not a rate or a time")
        return float(value)

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._error(name, f"is {value!r}, not text")
        return value

    def _constant(self, name: str) -> float:
        raise ValueError(f"{name} is not a number")

    def _error(self, what: str, why: str) -> FormatError:
        return FormatError(f"{self._source}: {what} {why}", hint=_HINT)
