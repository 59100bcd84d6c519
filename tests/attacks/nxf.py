"""Hostile NXF files: one wrong thing each, the hash of the header right, so that it is looked at.

name -> (what is changed in a file of two dense tensors and a group of experts, the message).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nexus_ext.formats import open_gguf
from nexus_ext.testing.synthetic import Tensor, write_gguf
from tests.synth.nxf import CHUNK, Draft, draft_of

Change = Callable[[Draft], None]
OFFSET, HASH, STORED, RAW, SHARD, CODEC, ZERO = range(7)


def valid(folder: Path) -> Draft:
    """Return a model that opens: "a" and "b" (3 chunks each), and 2 experts in 2 tensors."""
    tensors = [
        Tensor("a", (700,)),
        Tensor("b", (700,)),
        Tensor("blk.0.ffn_up_exps.weight", (32, 9, 2), "Q4_0"),
        Tensor("blk.0.ffn_down_exps.weight", (32, 9, 2), "Q4_0"),
    ]
    pairs = {"general.architecture": "llama", "llama.expert_count": 2}
    (gguf,) = write_gguf(folder / "m.gguf", pairs, tensors)
    return draft_of(
        gguf, [(t.name, t.offset, t.nbytes, max(1, t.n_experts)) for t in open_gguf(gguf).tensors]
    )


def top(**values: object) -> Change:
    return lambda draft: draft.descriptor.update(values)


def head(**values: object) -> Change:
    return lambda draft: draft.changes.update(values)


def tensor(number: int, **values: object) -> Change:
    return lambda draft: draft.descriptor["tensors"][number].update(values)


def file(**values: object) -> Change:
    return lambda draft: draft.descriptor["files"][0].update(values)


def entry(number: int, field: int, value: int) -> Change:
    def change(draft: Draft) -> None:
        draft.entries[number][field] = value

    return change


def text(encoded: bytes) -> Change:
    return lambda draft: draft.changes.update(text=encoded)


def with_text(old: str, new: str) -> Change:
    return lambda draft: draft.changes.update(
        text=json.dumps(draft.descriptor).replace(old, new, 1).encode()
    )


def without(key: str) -> Change:
    return lambda draft: draft.descriptor.pop(key)


def magic(value: bytes, version: int = 2) -> Change:
    def change(draft: Draft) -> None:
        draft.magic, draft.version = value, version

    return change


def shards(*names: str) -> Change:
    listed = [{"name": name, "nbytes": "0" * 16, "header_hash": "0" * 16} for name in names]
    return top(shards=listed, requires=["shards"])


def section(name: str, **values: object) -> Change:
    return top(sections=[{"name": name, "nbytes": 1, "chunk": 1, "first": 8, **values}])


def overlapping(draft: Draft) -> None:
    draft.entries[1][OFFSET] = draft.entries[0][OFFSET] + CHUNK - 1


def swapped_records(draft: Draft) -> None:
    """The second part of both experts changes places: records are torn."""
    one, other = draft.entries[8], draft.entries[9]
    one[OFFSET], other[OFFSET] = other[OFFSET], one[OFFSET]


def alignment_of_no_power_of_two(draft: Draft) -> None:
    draft.descriptor["alignment"] = draft.alignment = 5120


DEEP = b'{"requires":' + b"[" * 100_000
HUGE = 2**63 - 1

ATTACKS: dict[str, tuple[Change, str]] = {
    "foreign magic": (magic(b"PK\3\4\0\0\0\0"), r"the magic is b'PK"),
    "version 1": (magic(b"NXF1\1\0\0\0"), "version 1, which holds no tokenizer"),
    "text transfer": (magic(b"NXF2\n\x1a\n\0"), "damaged, perhaps by a transfer as text"),
    "draft": (magic(b"NXF2part"), "is unfinished"),
    "version 3": (magic(b"NXF2\r\n\x1a\n", 3), "is NXF version 3, this program reads version 2"),
    "flags": (head(flags=1), "reserved fields are 1 and 0"),
    "reserved number": (head(zero=7), "reserved fields are 0 and 7"),
    "huge header": (head(header=HUGE), "the limits are"),
    "header beyond the file": (head(header=1 << 29), r"has \d+ bytes, 536870912 are expected"),
    "header without room": (head(header=64), "the limits are"),
    "small header": (head(header=2048), "the limits are|is damaged"),
    "huge descriptor": (head(descriptor=HUGE), "the limits are"),
    "descriptor beyond the header": (head(descriptor=1 << 25), "the limits are"),
    "huge count of chunks": (head(chunks=HUGE), "the limits are"),
    "many chunks": (head(chunks=1 << 23), "the limits are"),
    "one chunk less": (head(chunks=9), "the padding from byte"),
    "longer file": (head(file=1 << 40), "1099511627776 are expected"),
    "no JSON": (text(b"\xff\xfe"), "is not valid JSON"),
    "no object": (text(b"[]"), "not an object"),
    "nested": (text(DEEP), "nested too deeply|is not valid JSON"),
    "huge number": (with_text('"alignment": 4096', '"alignment": ' + "9" * 5000), "not valid JSON"),
    "float": (with_text('"alignment": 4096', '"alignment": 4096.0'), "is not an integer"),
    "not a number": (with_text('"alignment": 4096', '"alignment": NaN'), "is not an integer"),
    "boolean": (with_text('"alignment": 4096', '"alignment": true'), "is True, not an integer"),
    "key twice": (with_text('"uses": []', '"uses": [], "uses": []'), "the same key twice"),
    "no tensors": (without("tensors"), "'tensors' is missing"),
    "unknown feature": (top(requires=["telepathy"]), "needs 'telepathy', which this program"),
    "unknown section needed": (top(requires=["section:x.y.z"]), "needs 'section:x.y.z'"),
    "features twice": (top(requires=["a", "a"]), "is there twice"),
    "alignment 4097": (top(alignment=4097), "its parts make 4097"),
    "alignment 5120": (alignment_of_no_power_of_two, "is 5120, not a power of two"),
    "alignment 0": (top(alignment=0), "'alignment' is 0, not an integer from 4096"),
    "codec with a path": (top(codecs=["../raw"]), "cannot be the name of a codec"),
    "too many codecs": (top(codecs=[f"c{i}" for i in range(65)]), "array of up to 64"),
    "long writer": (top(writer="x" * 256), "text of up to 255"),
    "header larger than file": (file(header_nbytes=HUGE), "'header_nbytes' is"),
    "no hash": (file(sha256="G" * 64), "not 64 hexadecimal digits"),
    "other size of the GGUF": (file(nbytes=3000), "ends at byte|the file at 3000"),
    "file name with a path": (file(name="../../etc/passwd"), "no plain file name"),
    "tensor without name": (tensor(0, name=""), "cannot be the name of a tensor"),
    "tensor of another name": (tensor(0, name="c"), "the GGUF header does not have the tensor"),
    "tensor twice": (tensor(1, name="a"), "the tensor 'a' occurs twice"),
    "tensor of another file": (tensor(0, file=1), "'file' is 1"),
    "tensor elsewhere": (tensor(1, offset=HUGE - 4096), "the file at"),
    "tensor over another": (tensor(1, offset=300), "overlaps"),
    "tensor in the header": (tensor(0, offset=0), "overlaps 'the header'"),
    "empty tensor": (tensor(0, nbytes=0), "'nbytes' is 0"),
    "huge tensor": (tensor(0, nbytes=HUGE), "the file at|overlaps"),
    "negative": (tensor(0, nbytes=-1), "'nbytes' is -1"),
    "odd matrices": (tensor(2, matrices=7), "does not divide"),
    "too many matrices": (tensor(2, matrices=1 << 20), "'matrices' is"),
    "chunk 0": (tensor(0, chunk=0), "'chunk' is 0"),
    "chunk of one byte": (tensor(0, chunk=1), "start at|chunks, "),
    "huge chunk": (tensor(0, chunk=1 << 27), "'chunk' is"),
    "numbering": (tensor(1, first=4), "start at 4, not at 3"),
    "no group": (top(groups=[]), "has matrices and is in no group"),
    "group of nothing": (top(groups=[[]]), "is no group"),
    "group of others": (top(groups=[[0, 1]]), "must be as many, and more than one"),
    "group of no tensor": (top(groups=[[2, 9]]), "is no group"),
    "group of itself": (top(groups=[[2, 2]]), "is no group"),
    "group of text": (top(groups=[["2"]]), "something else than arrays of numbers"),
    "tensor in two groups": (top(groups=[[2, 3], [3, 2]]), "is no group"),
    "chunk in the header": (entry(0, OFFSET, -100), "starts inside of a header"),
    "chunk behind the end": (entry(0, OFFSET, 1 << 50), "reaches past the end of its file"),
    "chunk that wraps around": (entry(0, OFFSET, 2**64 - 9000), "reaches past the end|inside of"),
    "chunks that overlap": (overlapping, "overlaps another chunk"),
    "chunk of another codec": (entry(0, CODEC, 1), "a codec that is not in the list"),
    "chunk of another shard": (entry(0, SHARD, 1), "a shard that is none of the 1 files"),
    "chunk that grows": (entry(0, STORED, 4096), "is larger than what it decodes to"),
    "raw that is shorter": (entry(0, STORED, 100), "is stored as it is, in fewer bytes"),
    "empty chunk": (entry(0, STORED, 0), "is empty"),
    "chunk of another size": (entry(0, RAW, 1 << 31), "does not have the bytes"),
    "reserved in a chunk": (entry(0, ZERO, 1), "a reserved field that is not 0"),
    "tensor not aligned": (entry(0, OFFSET, 512), "not a multiple of 4096|overlaps another"),
    "torn records": (swapped_records, "is not where its record has it"),
    "missing shard": (shards("m.001.nxf"), "is missing"),
    "shard that is the file": (shards("m.nxf"), "is in the set of shards twice"),
    "shard twice": (shards("m.gguf", "m.gguf"), "is missing|twice|magic"),
    "shard elsewhere": (shards("../m.nxf"), "no plain file name"),
    "shard without the feature": (
        top(shards=[{"name": "x", "nbytes": "0" * 16, "header_hash": "0" * 16}]),
        "is missing|without the feature",
    ),
    "section of no name": (section("secrets"), "a section has the name 'secrets'"),
    "section without chunks": (section("plan", first=10), "the table has 10 chunks, 11"),
    "huge section": (section("plan", nbytes=HUGE, first=10), "the table has"),
}
