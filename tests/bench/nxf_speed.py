"""Converters and codecs against the plain: copying a file, the disk, the entropy.

    python -m tests.bench.nxf_speed [--size 2G] [--quant Q4_K] [--folder DIR]

Prints, all in one run: the rate of `nexus convert` (raw) beside that of a plain copy of the same
file (a loop that reads and writes, and `cp`; both then fsync), interleaved, the page cache of the
source dropped before each; the seconds of processor that each took, which say more than the rate
where other work goes on; the most memory that the conversion took; and ratio and decode rate of
`ans` (one thread) on weights of a normal distribution of each type. Writes up to three times --size
into the folder, and removes it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nexus_ext.codecs.ans import AnsCodec, decode_by, paths
from nexus_ext.testing.synthetic.blocks import pattern
from nexus_ext.testing.synthetic.models import llama_dims_for_size, write_llama
from nexus_ext.units import format_bytes, parse_bytes

# Conversion in a process of its own, which says how much memory it had at most.
CHILD = """
import sys
from nexus_ext.formats.nxf_convert import to_nxf, to_gguf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import NxfSource, open_source
source, target, codec = sys.argv[1:]
if codec == "back":
    to_gguf(NxfSource(source), target, overwrite=True)
else:
    name, _, without = codec.partition(" without ")
    to_nxf(open_source(source), target, rules=Rules(name), overwrite=True, sha256=not without)
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""
SAMPLE_NBYTES = 1 << 20
TYPES = ("BF16", "F16", "F32", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "TQ2_0")


def cold(path: Path) -> None:
    """Put what is written on the disk and drop the page cache of the file."""
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Copy a file as plainly as it goes, onto the disk; return seconds."""
    cold(source)
    start = time.perf_counter()
    with open(source, "rb", buffering=0) as a, open(target, "wb", buffering=0) as b:
        buffer = bytearray(1 << 20)
        while got := a.readinto(buffer):
            b.write(memoryview(buffer)[:got])
        os.fsync(b.fileno())
    return time.perf_counter() - start


def copy_by_cp(source: Path, target: Path) -> float:
    """Copy a file by `cp`, onto the disk; return seconds."""
    cold(source)
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def processor_s() -> float:
    """Return the seconds of processor that this process and those that it started have taken."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def convert(source: Path, target: Path, codec: str) -> tuple[float, int]:
    """Convert in a process of its own; return (seconds, most bytes of memory)."""
    cold(source)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(target), codec],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, int(done.stdout) * 1024


def conversions(folder: Path, size: str, quant: str, repeat: int) -> None:
    """Compare converters with a copy."""
    gguf, nxf, other = folder / "m.gguf", folder / "m.nxf", folder / "copy"
    dims = llama_dims_for_size(parse_bytes(size, what="--size"), quant)
    write_llama(
        gguf,
        n_layers=dims.n_layers,
        n_embd=dims.n_embd,
        n_ff=dims.n_ff,
        n_heads=dims.n_heads,
        n_heads_kv=dims.n_heads_kv,
        n_vocab=dims.n_vocab,
        quant=quant,
    )
    nbytes = gguf.stat().st_size
    print(f"{format_bytes(nbytes)} of {quant}, {repeat} rounds, medians")
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    processor: dict[str, list[float]] = {}

    def note(what: str, before_s: float, seconds: float) -> None:
        times.setdefault(what, []).append(seconds)
        processor.setdefault(what, []).append(processor_s() - before_s)

    for _ in range(repeat):
        for what, plainly in (("copy", copy), ("cp", copy_by_cp)):
            before_s = processor_s()
            note(what, before_s, plainly(gguf, other))
            other.unlink()
        for what, source, target, codec in (
            ("to NXF, raw", gguf, nxf, "raw"),
            ("back to GGUF", nxf, other, "back"),
            ("without SHA-256", gguf, nxf, "raw without sha256"),
            ("to NXF, ans", gguf, nxf, "ans"),
            ("back from ans", nxf, other, "back"),
        ):
            before_s = processor_s()
            seconds, most = convert(source, target, codec)
            note(what, before_s, seconds)
            memory[what] = max(memory.get(what, 0), most)
            if codec == "ans":
                ratio = nxf.stat().st_size / nbytes
        other.unlink()
        nxf.unlink()
    plain = statistics.median(times["copy"])
    for what, found in times.items():
        seconds = statistics.median(found)
        line = (
            f"  {what:15} {format_bytes(nbytes / seconds):>10}/s  {plain / seconds:.2f} of a copy  "
            f"{statistics.median(processor[what]):.2f} s of processor"
        )
        print(line + (f"  {format_bytes(memory[what])} of memory" if what in memory else ""))
    print(f"  ans makes it {ratio:.3f} of its size")


def decoding(seconds: float) -> None:
    """Measure the decoder on one chunk of each type, every implementation."""
    codec = AnsCodec()
    print(f"ans on {format_bytes(SAMPLE_NBYTES)} of normal weights, one thread:")
    for type_name in TYPES:
        raw = pattern(type_name, 0, False)[:SAMPLE_NBYTES]
        start = time.perf_counter()
        stored = memoryview(codec.encode(memoryview(raw), type_name))
        encode_s = time.perf_counter() - start
        rates = []
        for name, path in paths().items():
            out = memoryview(bytearray(len(raw)))
            found = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                decode_by(path, stored, out)
                found.append(time.perf_counter() - start)
            rates.append(f"{name} {len(raw) / statistics.median(found) / 1e9:.2f}")
        print(
            f"  {type_name:6} {len(stored) / len(raw):.3f} of its size, decodes "
            f"{', '.join(rates)} GB/s, encodes {len(raw) / encode_s / 1e9:.2f} GB/s"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.nxf_speed")
    parser.add_argument("--size", default="2G")
    parser.add_argument("--quant", default="Q4_K", type=str.upper)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where the files go: the disk that is measured")
    args = parser.parse_args(arguments)
    decoding(0.2)
    with TemporaryDirectory(dir=args.folder) as folder:
        conversions(Path(folder), args.size, args.quant, args.repeat)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
