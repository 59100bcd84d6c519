"""What does it cost to have every first-party plugin installed? Decoding with and without, in turn.

    python -m tests.bench.decode_with_plugins [--weights SIZE] [--rounds N] [--tokens N]

Installs the distributions of plugins/ into a folder of their own and starts the same program twice:
once with that folder on its path, once without, each with the model loaded. They answer the same
prompt in turn, A B B A, greedily; what is compared is the time from the first token to the last, by
the clock and in seconds of processors (which other work on the machine changes less).
The answers must be the same, and every plugin must have been loaded. What they depend on and are
built with has to be installed: pip install numcodecs opentelemetry-sdk hatchling scikit-build-core.

nexus-template is among them: it takes over placement, I/O and prediction, by rules that are only
examples. --without NAME leaves a plugin out. With --markov and --lstm, files of these predictors, a
third program uses them. Without a model, a mixture of experts is written whose experts are streamed
through a cache of half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"

PROGRAM = """
import hashlib, json, sys, time
from nexus_ext import Llama, list_plugins
path, options, n, port = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.stdout
sys.stdout = sys.stderr
llm = Llama(path, verbose=False, **options)
states = {p.name: p.error or p.state for p in list_plugins()}
plan = llm.nexus.plan
said = f"{len(plan.expert_caches)} caches, {plan.streamed_bytes_per_token} bytes streamed a token"
print(json.dumps([states, said]), file=port, flush=True)
for line in sys.stdin:
    tokens, first = [], 0.0
    for token in llm.generate(json.loads(line), temp=0.0):
        if not first:
            first, cpu = time.perf_counter(), time.process_time()
        tokens.append(token)
        if len(tokens) == n:
            break
    seconds, cpu = time.perf_counter() - first, time.process_time() - cpu
    text = hashlib.sha256(repr(tokens).encode()).hexdigest()
    llm.reset()
    n_timed = len(tokens) - 1
    print(json.dumps([seconds / n_timed, cpu / n_timed, text]), file=port, flush=True)
"""


@dataclass(slots=True)
class Side:
    """A program that answers on request."""

    name: str
    process: subprocess.Popen[str]
    plugins: dict[str, str] = field(default_factory=dict)
    plan: str = ""
    seconds: list[float] = field(default_factory=list)  # of a token
    cpu: list[float] = field(default_factory=list)  # seconds of processors, the same
    answers: list[str] = field(default_factory=list)

    def ask(self, tokens: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(tokens) + "\n")
        self.process.stdin.flush()
        seconds, cpu, answer = self.read()
        self.seconds.append(seconds)
        self.cpu.append(cpu)
        self.answers.append(answer)

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the program ended with {self.process.wait()}")
        return json.loads(line)


def start(
    name: str, folder: Path | None, environ: dict[str, str], arguments: list[str], stack: ExitStack
) -> Side:
    variables = {**os.environ, **environ}
    if folder is not None:
        old = variables.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([str(folder), *([old] if old else [])])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=stack.enter_context(tempfile.TemporaryDirectory()),
        env=variables,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    side = Side(name, process)
    side.plugins, side.plan = side.read()
    return side


def install(target: Path, without: list[str]) -> list[str]:
    """Install every plugin; return the names of their entry points."""
    folders = sorted(path.parent for path in PLUGINS.glob("*/pyproject.toml"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "--upgrade"]
    for folder in folders:  # one by one: an error names its plugin
        # Without isolation: some are built with the nexus_ext of this environment.
        options = ["--no-deps", "--no-build-isolation", str(folder)]
        subprocess.run([*command, *options], check=True)
    names: list[str] = []
    for file in target.glob("*.dist-info/entry_points.txt"):
        lines = file.read_text(encoding="utf-8").splitlines()
        if "[nexus_ext]" in lines:
            names += [line.partition("=")[0].strip() for line in lines if "=" in line]
    if len(names) < len(folders):
        raise SystemExit(f"{len(folders)} plugins, entry points of {names} only")
    return sorted(set(names) - set(without))


def synthetic(stack: ExitStack) -> Path:
    from nexus_ext.testing import MoeDims, write_moe

    path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "moe.gguf")
    dims = MoeDims(8, 1024, 512, 8, 4, 4096, n_experts=64, n_used=4)
    write_moe(path, arch="gpt-oss", dims=dims, quant="Q8_0", expert_quant="Q4_0", skew=1.0)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a synthetic mixture of experts")
    parser.add_argument("--weights", help="budget for weights; default: half of the file")
    parser.add_argument("--rounds", type=int, default=20, help="of two requests to each program")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markov", help="file for NEXUS_MARKOV, in a third program")
    parser.add_argument("--lstm", help="file for NEXUS_LSTM, in a third program")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="of entry points")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = {"NEXUS_CACHE_DIR": stack.enter_context(tempfile.TemporaryDirectory())}
        expected = install(folder, args.without)
        model = args.model.resolve() if args.model else synthetic(stack)
        weights = args.weights or model.stat().st_size // 2
        options = {
            **{"weights": weights, "n_ctx": 512, "n_batch": 128, "flash_attn": True},
            **{"n_threads": args.threads, "n_threads_batch": args.threads, "warm_start": False},
        }
        arguments = [str(model), json.dumps(options), str(args.tokens)]
        chosen = {"NEXUS_LOAD_PLUGINS": ",".join(expected)} if args.without else {}
        sides = [
            start("none", None, {"NEXUS_LOAD_PLUGINS": "none", **cache}, arguments, stack),
            start("all", folder, {**cache, **chosen}, arguments, stack),
        ]
        files = {"NEXUS_MARKOV": args.markov, "NEXUS_LSTM": args.lstm}
        named = {key: str(Path(value).resolve()) for key, value in files.items() if value}
        if named:
            sides.append(start("trained", folder, {**cache, **chosen, **named}, arguments, stack))
        for side in sides[1:]:
            states = {name: side.plugins.get(name, "not found") for name in expected}
            if not set(states.values()) <= {"active", "overridden"}:
                raise SystemExit(f"{side.name}: not all plugins are in use: {states}")
        prompt = [1, *range(300, 340)]
        for side in sides:
            side.ask(prompt)  # warms up
            side.seconds.clear()
            side.cpu.clear()
        begin = time.perf_counter()
        for _ in range(args.rounds):
            for side in (*sides, *reversed(sides)):
                side.ask(prompt)
        took = time.perf_counter() - begin
        print(f"{model.name}: {len(expected)} plugins ({', '.join(expected)}), {took:.0f} s")
        base = sides[0]
        for side in sides:
            if side.answers != base.answers:
                raise SystemExit(f"{side.name}: other tokens than without plugins")
            print(f"{side.name:>8}: {side.plan}")
            for what, own, none in (
                ("by the clock", side.seconds, base.seconds),
                ("of processors", side.cpu, base.cpu),
            ):
                ratios = [b / a for a, b in zip(none, own, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(
                    f"          {statistics.median(own) * 1e3:8.3f} ms a token {what:<13}, median "
                    f"of pairs {middle:.4f} x none (quartiles {low:.4f} to {high:.4f})"
                )


if __name__ == "__main__":
    main()
