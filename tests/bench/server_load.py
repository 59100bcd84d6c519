"""Many clients for a while: some leave in the middle, some read slowly, some send rubbish.

    python -m tests.bench.server_load --clients 32 --seconds 300

`nexus serve` runs as a process of its own over three real models. Every greedy answer is compared
with that model run alone; memory, threads and descriptors of the server are sampled all the while.
Ends with status 1 when an answer was wrong, a status was not expected, or memory or descriptors
grew from the second fifth of the run to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from nexus_ext import Llama
from tests.cli_support import COMMAND
from tests.models_folder import model_folders

FILES = {
    "bit": "bitllama-3M-q8_0.gguf",
    "tales": "stories260K-q4_0.gguf",
    "dense": "tinydense-7M-Q4_K_M.gguf",
}
PROMPTS = (
    "Once upon a time",
    "The little dog",
    "Lily and Tom went to the park",
    "One day, a big",
    "Once there was a boy who had a red ball and a blue kite and a dog. " * 12,  # 220 tokens or so
)
N_TOKENS = 24
RUBBISH = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"\x00\xff\x16\x03\x01" * 50,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{{{{{",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n{",
)


def find(name: str) -> Path:
    for folder in model_folders():
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"{name} is in no folder of models")


def expected() -> dict[tuple[str, str], str]:
    """What every model answers to every prompt when it is alone."""
    made = {}
    for model, file in FILES.items():
        llm = Llama(str(find(file)), n_ctx=512, verbose=False)
        for prompt in PROMPTS:
            reply = llm(prompt, max_tokens=N_TOKENS, temperature=0)
            made[model, prompt] = reply["choices"][0]["text"]
        llm.close()
    return made


@dataclass
class Tally:
    """What all clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, what: str, wrong: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if wrong:
                self.wrong.append(wrong)


class Client:
    """One client, which does something else each time."""

    def __init__(self, url: str, answers: dict[tuple[str, str], str], seed: int, tally: Tally):
        self._url, self._answers, self._tally = url, answers, tally
        self._random = random.Random(seed)
        self._http = httpx.Client(base_url=url, timeout=120, trust_env=False)

    def run(self, end: float) -> None:
        kinds = ("whole", "stream", "ollama", "abort", "slow", "rubbish", "unknown")
        weights = (4, 4, 3, 2, 1, 1, 1)
        with self._http:
            while time.monotonic() < end:
                kind = self._random.choices(kinds, weights)[0]
                try:
                    getattr(self, f"_{kind}")()
                except Exception as error:
                    self._tally.add("failed", f"{kind}: {error!r}")

    def _ask(self) -> tuple[str, str, dict[str, object]]:
        model = self._random.choice(list(FILES))
        prompt = self._random.choice(PROMPTS)
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": N_TOKENS}
        return model, prompt, body

    def _judge(self, kind: str, model: str, prompt: str, text: str) -> None:
        right = text == self._answers[model, prompt]
        self._tally.add(kind, "" if right else f"{kind} {model} {prompt!r}: {text!r}")

    def _refused(self, response: httpx.Response) -> bool:
        if response.status_code in (429, 503):
            late = "retry-after" in response.headers
            self._tally.add("told to come back", "" if late else "no Retry-After")
            time.sleep(0.05)
            return True
        return False

    def _whole(self) -> None:
        model, prompt, body = self._ask()
        begin = time.monotonic()
        response = self._http.post("/v1/completions", json=body)
        if not self._refused(response):
            self._tally.seconds.append(time.monotonic() - begin)
            self._judge("whole", model, prompt, response.json()["choices"][0]["text"])

    def _stream(self, pause_s: float = 0.0, leave_after: int | None = None) -> None:
        model, prompt, body = self._ask()
        kind = "slow" if pause_s else "abort" if leave_after is not None else "stream"
        text, n = "", 0
        with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as got:
            if self._refused(got):
                return
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    n += 1
                    if leave_after is not None and n >= leave_after:
                        self._tally.add("abort")
                        return
                    time.sleep(pause_s)
        self._judge(kind, model, prompt, text)

    def _slow(self) -> None:
        self._stream(pause_s=0.05)

    def _abort(self) -> None:
        self._stream(leave_after=self._random.randrange(1, N_TOKENS // 2))

    def _ollama(self) -> None:
        model, prompt, _ = self._ask()
        options = {"temperature": 0, "num_predict": N_TOKENS}
        body = {"model": model, "prompt": prompt, "raw": True, "options": options}
        response = self._http.post("/api/generate", json=body)
        if not self._refused(response):
            text = "".join(json.loads(part)["response"] for part in response.text.splitlines())
            self._judge("ollama", model, prompt, text)

    def _rubbish(self) -> None:
        port = int(self._url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(self._random.choice(RUBBISH))
            if self._random.random() < 0.5:
                client.settimeout(0.2)
                try:
                    client.recv(1000)
                except OSError:
                    pass
        self._tally.add("rubbish")

    def _unknown(self) -> None:
        body = {"model": "none", "prompt": "x"}
        status = self._http.post("/v1/completions", json=body).status_code
        self._tally.add("unknown", "" if status in (404, 429) else f"unknown model: {status}")


@dataclass(frozen=True, slots=True)
class Sample:
    rss_bytes: int
    n_files: int
    n_threads: int


def sample(pid: int) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(int(status["VmRSS"].split()[0]) << 10, files, int(status["Threads"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--budget", default="96M")
    parser.add_argument("--max-queue", type=int, default=24)
    chosen = parser.parse_args()
    answers = expected()
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "NEXUS_MODELS": f"{home}/store",
            "NEXUS_MODELS_OLLAMA": "",
            "NEXUS_MODELS_LM_STUDIO": "",
            "NEXUS_ENGINE_MAX_QUEUE": str(chosen.max_queue),
            "NEXUS_SERVER_MAX_REQUESTS": str(max(8, chosen.clients - 4)),
            "XDG_CONFIG_HOME": home,
        }
        for name, file in FILES.items():
            make = [*COMMAND, "create", name, str(find(file)), "--quiet"]
            subprocess.run(make, env=environment, check=True)
        serve = [*COMMAND, "serve", "--port", "0", "--budget", chosen.budget, "-c", "512", "--json"]
        log = open(f"{home}/log", "wb")
        server = subprocess.Popen(
            serve, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert server.stdout is not None
        text = ""
        while "}" not in text:
            line = server.stdout.readline()
            if not line:
                raise SystemExit(Path(f"{home}/log").read_text())
            text += line
        url = json.loads(text)["url"]
        tally = Tally()
        end = time.monotonic() + chosen.seconds
        clients = [Client(url, answers, seed, tally) for seed in range(chosen.clients)]
        threads = [threading.Thread(target=client.run, args=(end,)) for client in clients]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            time.sleep(max(0.05, chosen.seconds / 200))
            samples.append(sample(server.pid))
        time.sleep(1)
        with httpx.Client(base_url=url, trust_env=False) as http:
            left = sum(s["n_running"] + s["n_waiting"] for s in http.get("/slots").json())
        idle = sample(server.pid)
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
        said = Path(f"{home}/log").read_text(errors="replace")
        log.close()
    return report(tally, samples, idle, left, status, said, chosen.seconds)


def report(
    tally: Tally,
    samples: list[Sample],
    idle: Sample,
    left: int,
    status: int,
    said: str,
    seconds: float,
) -> int:
    n = len(samples)
    early, late = samples[n // 5 : 2 * n // 5], samples[4 * n // 5 :]
    grown = _median(late, "rss_bytes") - _median(early, "rss_bytes")
    files = _median(late, "n_files") - _median(early, "n_files")
    total = sum(tally.counts.values())
    print(f"{total} requests in {seconds:.0f} s: {dict(tally.counts.most_common())}")
    if tally.seconds:
        ordered = sorted(tally.seconds)
        print(
            f"whole answers of {N_TOKENS} tokens: median {statistics.median(ordered) * 1e3:.0f} ms,"
            f" 99th percentile {ordered[len(ordered) * 99 // 100] * 1e3:.0f} ms"
        )
    print(f"wrong: {len(tally.wrong)} {tally.wrong[:5]}")
    print(
        f"memory: {_median(early, 'rss_bytes') / 2**20:.1f} MiB early, "
        f"{_median(late, 'rss_bytes') / 2**20:.1f} MiB late; descriptors: "
        f"{_median(early, 'n_files'):.0f} early, {_median(late, 'n_files'):.0f} late, "
        f"{idle.n_files} idle; threads at most {max(s.n_threads for s in samples)}"
    )
    tracebacks = said.count("Traceback")
    print(f"left running: {left}; exit status {status}; tracebacks in the log: {tracebacks}")
    if tracebacks:
        print(said[said.find("Traceback") :][:4000])
    good = not tally.wrong and grown < 8 << 20 and files < 8
    return 0 if good and left == 0 and status == 0 and tracebacks == 0 else 1


def _median(samples: list[Sample], name: str) -> float:
    return statistics.median(getattr(s, name) for s in samples)


if __name__ == "__main__":
    sys.exit(main())
