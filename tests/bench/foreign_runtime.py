"""Page weights inside llama.cpp's own programs, built from source, and compare their output.

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python
    tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \
        -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build build -j2 --target llama-completion llama-server ggml-cpu
    python -m tests.bench.foreign_runtime build/bin MODEL --weights 1M

Runs llama-completion with and without `nexus exec`, for each flash attention and each way of
loading, and llama-server with one request; every output must be the same text. GGML_BACKEND_DL
makes ggml load the library in GGML_BACKEND_PATH; without OpenMP the CPU backend starts threads by
itself, so this is also the test of a lasting thread pool. Threads are given (-t): more of them than
cores is slow for reasons of its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PROMPT = "Once upon a time"


def nexus(model: str, weights: str) -> list[str]:
    command = [sys.executable, "-m", "nexus_ext.cli", "exec", "--weights", weights]
    return [*command, "--model", model, "--"]


def complete(prefix: list[str], program: list[str]) -> tuple[str, str, float]:
    """Return (text, last line of stderr, seconds)."""
    begin = time.perf_counter()
    done = subprocess.run([*prefix, *program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(program)} failed:\n{done.stderr[-2000:]}")
    return done.stdout, done.stderr.strip().splitlines()[-1], time.perf_counter() - begin


def ask_server(prefix: list[str], program: list[str]) -> str:
    """Start a server, ask it once, end it with SIGTERM; return its answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"prompt": PROMPT, "n_predict": 24, "temperature": 0}).encode()
    server = subprocess.Popen(
        [*prefix, *program, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health") as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None:
                    raise SystemExit("llama-server ended before it was ready") from None
            time.sleep(0.2)
        request = urllib.request.Request(
            f"{url}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            text: str = json.load(answer)["content"]
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate()
    if prefix:
        print("    ", errors.decode(errors="replace").strip().splitlines()[-1])
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin", type=Path, help="where llama-completion and llama-server are")
    parser.add_argument("model")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    common = ["-m", args.model, "-t", args.threads, "-c", "256"]
    paged = nexus(args.model, args.weights)
    wrong = 0
    for flash_attention in ("off", "on"):
        for load in ("mmap", "none", "dio"):
            program = [str(args.bin / "llama-completion"), *common, "-fa", flash_attention]
            program += ["-lm", load, "-n", "24", "-no-cnv", "-p", PROMPT, "--temp", "0"]
            text, _, alone_s = complete([], program)
            streamed, accounting, paged_s = complete(paged, program)
            same = text == streamed
            wrong += not same
            print(
                f"llama-completion -fa {flash_attention} -lm {load}: "
                f"{'same text' if same else 'DIFFERENT TEXT'}, {alone_s:.2f} s alone, "
                f"{paged_s:.2f} s paged (planning included)\n     {accounting}"
            )
    program = [str(args.bin / "llama-server"), *common, "-fa", "off"]
    same = ask_server([], program) == ask_server(paged, program)
    wrong += not same
    print(f"llama-server: {'same text' if same else 'DIFFERENT TEXT'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
