"""What the server itself costs per streamed token: a null engine behind it, a raw client before it.

    python -m tests.bench.server_overhead

A null engine hands out tokens as fast as it is asked. The server runs in a process of its own; the
client reads bytes and counts events. Wall time and processor time of the server, divided by tokens,
less what the same engine costs without a server. The goal is 0.3 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server import Config
from nexus_ext.server.config import ServerConfig
from nexus_ext.server.serving import serve
from tests.fake_engine import FakeEngine
from tests.models_folder import model_folders
from tests.server_support import MODEL, library_with

PIECE = b" token"
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"prompt": "hi"},
}
GOAL_MS = 0.3


def engine(n: int) -> FakeEngine:
    made = FakeEngine([MODEL])
    made.script = lambda request: [PIECE] * n
    return made


async def alone(n: int) -> float:
    """Milliseconds that the null engine takes per token without a server."""
    request = GenerateRequest(MODEL, [1])
    begin = time.perf_counter()
    pieces = 0
    async for event in engine(n).generate(request):
        pieces += isinstance(event, Piece)
        if isinstance(event, Done):
            break
    assert pieces == n
    return (time.perf_counter() - begin) * 1e3 / n


def stream(port: int, path: str, n: int) -> tuple[float, int]:
    """Return seconds from the request to the last byte, and bytes."""
    body = {"model": "tiny", "stream": True, "max_tokens": n, **PATHS[path]}
    if path == "/v1/responses":
        body.pop("max_tokens")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        begin = time.perf_counter()
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        first = client.recv(1 << 20)
        n_bytes = len(first)
        tokens = first.count(b" token")
        rest = b""
        while part := client.recv(1 << 20):
            n_bytes += len(part)
            joined = rest + part
            tokens += joined.count(b" token")
            rest = joined[-5:]  # shorter than what is counted
        seconds = time.perf_counter() - begin
    assert tokens >= n, (tokens, n)
    return seconds, n_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=4000, help="tokens of one stream")
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    file = next(
        folder / "stories260K-q4_0.gguf"
        for folder in model_folders()
        if (folder / "stories260K-q4_0.gguf").is_file()
    )
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with tempfile.TemporaryDirectory() as store:
            library = library_with(Path(store), file)
            config = Config(server=ServerConfig(port=0))

            def say(url: str) -> None:
                os.write(told, url.rpartition(":")[2].encode())

            serve(lambda: engine(chosen.n), library, config, ready=say)
        os._exit(0)
    port = int(os.read(ready, 16))
    null_ms = statistics.median(asyncio.run(alone(chosen.n)) for _ in range(3))
    print(f"null engine without a server: {null_ms:.4f} ms a token")
    worst = 0.0
    cpu_path = Path(f"/proc/{child}/stat")
    tick = os.sysconf("SC_CLK_TCK")
    for path in PATHS:
        walls, cpus, size = [], [], 0
        for _ in range(chosen.repeat):
            before = _cpu_s(cpu_path, tick)
            seconds, size = stream(port, path, chosen.n)
            walls.append(seconds * 1e3 / chosen.n - null_ms)
            cpus.append((_cpu_s(cpu_path, tick) - before) * 1e3 / chosen.n - null_ms)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        worst = max(worst, wall)
        print(
            f"{path:<22} {wall:.3f} ms a token (best {min(walls):.3f}, worst {max(walls):.3f}), "
            f"processor time of the server {cpu:.3f} ms, {size / chosen.n:.0f} bytes a token"
        )
    os.kill(child, 15)
    os.waitpid(child, 0)
    verdict = "under" if worst < GOAL_MS else "OVER"
    print(f"worst median {worst:.3f} ms, {verdict} the goal of {GOAL_MS} ms")
    return 0 if worst < GOAL_MS else 1


def _cpu_s(stat: Path, tick: int) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / tick


if __name__ == "__main__":
    sys.exit(main())
