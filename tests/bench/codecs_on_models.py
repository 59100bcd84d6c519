"""What codecs make of trained weights: size and rate of decoding, by type of the weights.

    python -m tests.bench.codecs_on_models MODEL.gguf... [--codecs zstd,ans,blosc] [--most 16M]

Encodes up to `--most` bytes of each type in chunks of `--chunk`, checks that they come back, and
decodes them again and again in one thread. The codec of plugins/nexus-codec-blosc is taken from
the checkout when its requirements are installed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gguf
import numpy as np

from nexus_ext.codecs import Codec, Codecs
from nexus_ext.units import parse_bytes
from tests.bench.plugins_path import add_plugins


def codecs() -> Codecs:
    add_plugins()
    try:
        from nexus_codec_blosc.codec import BloscCodec

        return Codecs([BloscCodec()])
    except ImportError:
        return Codecs()


def measured(codec: Codec, chunks: list[bytes], type_name: str) -> tuple[float, float]:
    """Return (stored / raw, bytes decoded a second)."""
    encoded = [codec.encode(memoryview(chunk), type_name) for chunk in chunks]
    targets = [bytearray(len(chunk)) for chunk in chunks]
    best, n = float("inf"), sum(map(len, chunks))
    for _ in range(5):
        begin = time.perf_counter()
        for stored, out in zip(encoded, targets, strict=True):
            codec.decode(memoryview(stored), memoryview(out))
        best = min(best, time.perf_counter() - begin)
    assert targets == chunks
    return sum(map(len, encoded)) / n, n / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--codecs", default="zstd,ans,blosc")
    parser.add_argument("--most", default="16M", help="bytes of each type")
    parser.add_argument("--chunk", default="1M")
    args = parser.parse_args()
    known, names = codecs(), args.codecs.split(",")
    most, size = parse_bytes(args.most, what="--most"), parse_bytes(args.chunk, what="--chunk")
    print(f"{'':24}{'type':>6}{'MiB':>7}" + "".join(f"{name:>18}" for name in names))
    for path in args.models:
        by_type: dict[str, bytearray] = {}
        for tensor in gguf.GGUFReader(path).tensors:
            part = by_type.setdefault(tensor.tensor_type.name, bytearray())
            part += np.asarray(tensor.data).tobytes()[: most - len(part)]
        for type_name, data in by_type.items():
            if len(data) < 1 << 16:
                continue
            chunks = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
            row = f"{path.stem:24.24}{type_name:>6}{len(data) / 2**20:>7.1f}"
            for name in names:
                ratio, rate = measured(known.get(name), chunks, type_name)
                row += f"{ratio:>8.1%}{rate / 1e9:>6.2f} GB/s"
            print(row, flush=True)


if __name__ == "__main__":
    main()
