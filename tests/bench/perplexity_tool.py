"""Compare `nexus quality` with llama.cpp's own perplexity tool, figure by figure.

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-*.tar.gz
    python -m tests.bench.perplexity_tool llama_cpp_python-*/vendor/llama.cpp TEXT F16 QUANTIZED...

The tool's two sources are compiled against the libraries of the installed wheel (seconds, not a
build of llama.cpp), so both sides compute with the same kernels: what is compared is the text's
windows and the arithmetic on the logits. Perplexities must agree to 4 digits behind the point.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from nexus_ext.placement import PlanRequest
from nexus_ext.runtime.quality import compare_models

LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")


def build(source: Path, tool: str, directory: Path) -> Path:
    """Compile tools/`tool` of llama.cpp's source; return the program."""
    lib = Path(llama_cpp.__file__).parent.parent / "lib"
    if not (lib / "libllama-common.so").exists():
        raise SystemExit(f"{lib} has no libllama-common.so: install llama-cpp-python's own wheel")
    program = directory / f"llama-{tool}"
    includes = [f"-I{source / d}" for d in ("include", "common", "ggml/include", "src", "vendor")]
    files = [str(f) for f in sorted((source / "tools" / tool).glob("*.cpp"))]
    links = [f"-L{lib}", *(f"-l{name}" for name in LIBRARIES), "-lpthread"]
    command = ["c++", "-O2", "-std=c++17", *includes, *files, "-o", str(program), *links]
    subprocess.run([*command, "-Wl,--disable-new-dtags", f"-Wl,-rpath,{lib}"], check=True)
    return program


def run_tool(program: Path, *arguments: str) -> str:
    lib = Path(llama_cpp.__file__).parent.parent / "lib"
    environ = {**os.environ, "LD_LIBRARY_PATH": str(lib)}
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, env=environ, check=False
    )
    if done.returncode:
        raise SystemExit(f"{program.name} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Figures:
    """What the tool prints."""

    perplexity: float
    reference: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top: float


def figures(text: str) -> Figures:
    def found(pattern: str) -> float:
        match = re.search(pattern + r"\s*:\s*([\d.]+)", text)
        if match is None:
            raise SystemExit(f"the tool printed no {pattern!r}:\n{text[-2000:]}")
        return float(match[1])

    return Figures(
        perplexity=found(r"Mean PPL\(Q\) "),
        reference=found(r"Mean PPL\(base\) "),
        kl_mean=found("Mean    KLD"),
        kl_p99=found(r"99\.0%   KLD"),
        kl_max=found("Maximum KLD"),
        same_top=found("Same top p") / 100,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source")
    parser.add_argument("text", type=Path)
    parser.add_argument("reference")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attn", action="store_true")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="nexus-tool-") as directory:
        tool = build(args.source, "perplexity", Path(directory))
        base = str(Path(directory) / "base")
        # One sequence a batch and no repacked weights, as nexus_ext computes.
        common = ["-f", str(args.text), "-c", str(args.ctx), "-b", str(args.ctx), "-nr"]
        common += ["-t", str(args.threads), "-fa", "on" if args.flash_attn else "off"]
        common += ["--kl-divergence-base", base]
        run_tool(tool, "-m", args.reference, *common)
        request = PlanRequest(
            n_ctx=args.ctx,
            n_batch=args.ctx,
            n_ubatch=min(args.ctx, 512),
            n_threads=args.threads,
            flash_attn=args.flash_attn,
            gpu_bytes=0,
        )
        for model in args.models:
            theirs = figures(run_tool(tool, "-m", model, *common, "--kl-divergence"))
            ours = compare_models(model, args.reference, args.text.read_bytes(), request)
            pairs = (
                ("perplexity", ours.perplexity.value, theirs.perplexity),
                ("of the reference", ours.reference_perplexity.value, theirs.reference),
                ("KL mean", ours.kl_mean.value, theirs.kl_mean),
                ("KL 99th percentile", ours.kl_p99.value, theirs.kl_p99),
                ("KL largest", ours.kl_max, theirs.kl_max),
                ("same top", ours.same_top.value, theirs.same_top),
            )
            print(model)
            for name, mine, his in pairs:
                print(f"  {name:<20} nexus {mine:12.6f}   llama-perplexity {his:12.6f}")
            for mine, his in ((pairs[0][1], pairs[0][2]), (pairs[1][1], pairs[1][2])):
                wrong += abs(mine - his) > 1e-4
    print("perplexities agree to 4 digits" if not wrong else "PERPLEXITIES DIFFER")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
