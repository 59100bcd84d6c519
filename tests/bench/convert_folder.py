"""How fast a folder of the hub becomes a GGUF, beside a plain copy, and in how much memory.

    python -m tests.bench.convert_folder --size 1G --directory DIR

Writes a synthetic llama in BF16 there (16 layers, one shard), then alternates between copying its
weights with `shutil.copyfile` and converting it in a process of its own, each with its file synced
to the disk. Both read from the page cache, if it holds the folder. Prints each run, and medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nexus_ext.units import GIB, MIB, format_bytes, parse_bytes
from tests.synth.hf import HfDims, config_of, weights_of, write_hf, write_json

_CONVERT = """
import json, sys, time
from nexus_ext.formats.hf import HfConversion
from nexus_ext.hardware import process_peak_bytes
start = time.perf_counter()
HfConversion(sys.argv[1], float_type=sys.argv[3]).write(sys.argv[2])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": process_peak_bytes()}))
"""


def write_folder(folder: Path, nbytes: int) -> int:
    """Write a llama of about `nbytes` in BF16; return the bytes of its weights."""
    layers = 16
    per_layer = 4 + 3 * 3.5  # in squares of the embedding
    n_embd = max(int((nbytes / 2 / layers / per_layer) ** 0.5) // 256 * 256, 256)
    dims = HfDims(
        n_layers=layers,
        n_embd=n_embd,
        n_ff=int(3.5 * n_embd),
        n_heads=n_embd // 64,
        n_heads_kv=n_embd // 64,
        head_dim=64,
        n_vocab=512,
    )
    write_hf(folder, dims=dims, weights={"x": np.zeros(1, np.float32)})
    write_json(folder / "config.json", config_of("llama", dims))
    shapes = {n: a.shape for n, a in weights_of("llama", HfDims(n_layers=layers)).items()}
    # The small model's extents are all different: they name the large one's.
    small = HfDims()
    extents = {
        small.n_vocab: dims.n_vocab,
        small.n_ff: dims.n_ff,
        small.n_embd: n_embd,
        small.n_heads_kv * small.head_dim: n_embd,
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        large = [extents[extent] for extent in shape]
        end = at + int(np.prod(large)) * 2
        header[name] = {"dtype": "BF16", "shape": large, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).normal(0, 0.02, MIB // 2).astype(np.float32)
    piece = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, at, MIB):
            file.write(piece[: at - start])
    return at


def copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - start


def convert(folder: Path, target: Path, float_type: str) -> dict[str, float]:
    command = [sys.executable, "-c", _CONVERT, str(folder), str(target), float_type]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    found: dict[str, float] = json.loads(out)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1G", help="of the weights (units are binary)")
    parser.add_argument("--directory", help="on the disk to measure  [default: a temporary one]")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        folder, out = Path(directory) / "m", Path(directory) / "out"
        nbytes = write_folder(folder, parse_bytes(args.size, what="--size"))
        print(f"{format_bytes(nbytes)} of weights in BF16")
        rates: dict[str, list[float]] = {"copy": [], "auto": [], "f32": []}
        for _ in range(args.repeat):
            seconds = copy(folder / "model.safetensors", out)
            rates["copy"].append(nbytes / seconds)
            out.unlink()
            for float_type in ("auto", "f32"):
                found = convert(folder, out, float_type)
                out.unlink()
                rates[float_type].append(nbytes / found["seconds"])
                print(
                    f"{float_type}: {rates[float_type][-1] / GIB:.2f} GiB/s read, peak "
                    f"{format_bytes(found['peak'])}, copy {rates['copy'][-1] / GIB:.2f} GiB/s"
                )
        middle = {name: statistics.median(values) for name, values in rates.items()}
        print(
            "medians: "
            + ", ".join(f"{name} {rate / GIB:.2f} GiB/s" for name, rate in middle.items())
            + f"; converting without a change of type runs at {middle['auto'] / middle['copy']:.2f}"
            " of a copy"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
