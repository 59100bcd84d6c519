"""Build NXF files by hand, field by field, also wrong ones.

A second implementation of the encoding, apart from the product's: what one writes the other has to
read. Everything is stored as it is, one chunk a kilobyte.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

MAGIC = b"NXF2\r\n\x1a\n"
CHUNK = 1024
ALIGNMENT = 4096


@dataclass
class Draft:
    """A file to be, every part of it open to change; `encode` does the rest."""

    descriptor: dict[str, Any]
    gguf: bytes  # headers
    entries: list[list[int]]  # offset, hash, stored, raw, shard, codec, zero
    data: bytearray  # everything behind the header; offsets of entries count from there
    magic: bytes = MAGIC
    version: int = 2
    alignment: int = ALIGNMENT
    changes: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the file, its hash right for whatever it says."""
        text = json.dumps(self.descriptor).encode()
        text = self.changes.get("text", text)
        body = text + self.gguf
        body += bytes(-(64 + len(body)) % 32)
        size = 64 + len(body) + 32 * len(self.entries)
        padding = bytes(-size % self.alignment)
        size += len(padding)
        table = b"".join(
            struct.pack("<QQIIHHI", (entry[0] + size) % 2**64, *entry[1:]) for entry in self.entries
        )
        fields = {
            "header": size,
            "descriptor": len(text),
            "chunks": len(self.entries),
            "file": size + len(self.data),
            "flags": 0,
            "zero": 0,
            **{k: v for k, v in self.changes.items() if k != "text"},
        }
        head = self.magic + struct.pack(
            "<IIQQQQQ",
            self.version,
            fields["flags"],
            fields["header"],
            fields["descriptor"],
            fields["chunks"],
            fields["file"],
            fields["zero"],
        )
        rest = body + table + padding
        digest = xxhash.xxh3_64_intdigest(head + bytes(8) + rest)
        return head + struct.pack("<Q", digest) + rest + bytes(self.data)


def draft_of(gguf: Path, tensors: list[tuple[str, int, int, int]]) -> Draft:
    """Take apart a GGUF, of which `tensors` are (name, offset, bytes, matrices).

    Tensors with more than one matrix become one group.
    """
    data = gguf.read_bytes()
    n_header = min((offset for _, offset, _, _ in tensors), default=len(data))
    draft = Draft({}, data[:n_header], [], bytearray())
    described, first = [], 0
    group = [i for i, t in enumerate(tensors) if t[3] > 1]
    rows: dict[int, list[list[int]]] = {}
    for number, (name, offset, nbytes, matrices) in enumerate(tensors):
        per = -(-(nbytes // matrices) // CHUNK)
        described.append(
            {
                "name": name,
                "file": 0,
                "offset": offset,
                "nbytes": nbytes,
                "matrices": matrices,
                "chunk": CHUNK,
                "first": first,
            }
        )
        first += per * matrices
        if matrices == 1:
            rows[number] = _store(draft, data[offset : offset + nbytes], ALIGNMENT)
        else:
            rows[number] = []
    n_matrices = tensors[group[0]][3] if group else 0
    for matrix in range(n_matrices):
        for number in group:
            _, offset, nbytes, _ = tensors[number]
            size = nbytes // n_matrices
            start = offset + matrix * size
            rows[number] += _store(draft, data[start : start + size], 4096)
    draft.entries = [row for number in range(len(tensors)) for row in rows[number]]
    draft.descriptor = {
        "requires": [],
        "uses": [],
        "writer": "by hand",
        "alignment": ALIGNMENT,
        "codecs": ["raw"],
        "files": [
            {"name": gguf.name, "nbytes": len(data), "header_nbytes": n_header, "sha256": "0" * 64}
        ],
        "tensors": described,
        "rests": [],
        "groups": [group] if group else [],
        "sections": [],
        "shards": [],
    }
    return draft


def _store(draft: Draft, raw: bytes, alignment: int) -> list[list[int]]:
    draft.data += bytes(-len(draft.data) % alignment)
    rows = []
    for start in range(0, len(raw), CHUNK):
        piece = raw[start : start + CHUNK]
        digest = xxhash.xxh3_64_intdigest(piece)
        rows.append([len(draft.data), digest, len(piece), len(piece), 0, 0, 0])
        draft.data += piece
    return rows
