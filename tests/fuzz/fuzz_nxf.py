"""Any bytes as an NXF file: a FormatError or a model, never anything else.

    python -m tests.fuzz.fuzz_nxf [--seconds 60]     by changing good files, needs nothing
    python -m tests.fuzz.fuzz_nxf --atheris          with atheris, which follows the coverage

The hash of the header is made right again in most inputs, since nothing behind it would be looked
at otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash

from nexus_ext.errors import FormatError, NexusError
from nexus_ext.formats import open_model
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.nxf_verify import check_file
from nexus_ext.formats.sources import open_source
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.attacks.nxf import ATTACKS, valid

# What a reader may say of a file; anything else is a defect. A codec that is not known is a
# UsageError of the reader of its chunks, and check_file does not raise it.
ALLOWED = (FormatError,)


def seeds(folder: Path) -> list[bytes]:
    """Return good files, and files with one wrong thing."""
    (gguf,) = write_moe(folder / "s.gguf", dims=MoeDims(n_layers=1, n_experts=2), quant="BF16")
    found = []
    for codec in ("raw", "ans"):
        source = open_source(gguf)
        to_nxf(source, folder / "s.nxf", rules=Rules(codec), overwrite=True)
        source.close()
        found.append((folder / "s.nxf").read_bytes())
    found.append(valid(folder).encode())
    for change, _ in ATTACKS.values():
        draft = valid(folder)
        change(draft)
        encoded = draft.encode()
        if len(encoded) < 1 << 17:
            found.append(encoded)
    return found


def try_file(path: Path, data: bytes) -> bool:
    """Open and check `data` as a file; return whether it was taken for a model."""
    path.write_bytes(data)
    try:
        open_model(path)
        check_file(path)
    except ALLOWED:
        return False
    except NexusError as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return True


def with_right_hash(data: bytes) -> bytes:
    """Make the hash and the file size of a header right, whatever else it says."""
    if len(data) < 64:
        return data
    out = bytearray(data)
    (header,) = struct.unpack_from("<Q", out, 16)
    if not 64 <= header <= len(out):
        return data
    struct.pack_into("<Q", out, 40, len(out))
    struct.pack_into("<Q", out, 56, 0)
    struct.pack_into("<Q", out, 56, xxhash.xxh3_64_intdigest(bytes(out[:header])))
    return bytes(out)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes, mostly of the header, or a number of the descriptor."""
    out = bytearray(data)
    if rng.random() < 0.4:
        return with_right_hash(_other_number(rng, bytes(out)))
    header = struct.unpack_from("<Q", out, 16)[0] if len(out) >= 64 else len(out)
    for _ in range(rng.randrange(1, 6)):
        range_ = min(header, len(out)) if rng.random() < 0.8 else len(out)
        at = rng.randrange(max(range_, 1))
        kind = rng.randrange(4)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B))
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, 2**15, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(out)))
            out[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        else:
            del out[at : at + rng.randrange(1, 40)]
        if not out:
            return b""
    return with_right_hash(bytes(out)) if rng.random() < 0.9 else bytes(out)


def _other_number(rng: random.Random, data: bytes) -> bytes:
    """Replace a value of the descriptor by another, keeping its length by blanks where it fits."""
    size = struct.unpack_from("<Q", data, 24)[0] if len(data) >= 64 else 0
    text = data[64 : 64 + size]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return data
    place, key = value, rng.choice(list(value) or [""])
    while isinstance(place, dict) and isinstance(place.get(key), (dict, list)) and place[key]:
        inner = place[key]
        if isinstance(inner, list):
            inner = rng.choice(inner)
        if not isinstance(inner, dict):
            break
        place, key = inner, rng.choice(list(inner))
    if isinstance(place, dict):
        place[key] = rng.choice(
            (0, 1, -1, 2**31, 2**63 - 1, 2**64, None, True, "", "raw", [], {}, 3, "x" * 300, 16384)
        )
    encoded = json.dumps(value, separators=(",", ":")).encode()
    if len(encoded) > size:
        return data
    return data[:64] + encoded.ljust(size) + data[64 + size :]


def by_chance(seconds: float, seed: int) -> int:
    """Try changed seeds for so long; return how many."""
    rng = random.Random(seed)
    count = taken = 0
    with TemporaryDirectory() as folder:
        corpus = seeds(Path(folder))
        path = Path(folder) / "m.nxf"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = mutate(rng, rng.choice(corpus))
            try:
                taken += try_file(path, data)
            except BaseException:
                Path("crash.nxf").write_bytes(data)
                raise
            count += 1
    print(f"{count} files, {taken} of them taken for a model, seed {seed}: nothing found")
    return count


def by_atheris(arguments: Sequence[str]) -> None:
    """Let atheris make the files."""
    import atheris

    folder = TemporaryDirectory()
    path = Path(folder.name) / "m.nxf"

    def one(data: bytes) -> None:
        try_file(path, with_right_hash(data))

    corpus = Path(folder.name) / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(Path(folder.name))):
        (corpus / f"{number}.nxf").write_bytes(data)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], str(corpus), *arguments], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.fuzz_nxf")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--atheris", action="store_true")
    args, rest = parser.parse_known_args()
    if args.atheris:
        by_atheris([f"-max_total_time={int(args.seconds)}", *rest])
    else:
        by_chance(args.seconds, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
