"""The backend in a runtime that was built by others: node-llama-cpp, from npm.

Its ggml (0.25.1) is older than the one in llama-cpp-python, its libraries have other SONAMEs, its
CPU backends are loaded dynamically and start threads of their own instead of OpenMP's. The same
binary of the backend must work there by environment variables alone and give the same tokens; and
the same again from an NXF, through `nexus exec`.

    python -m tests.bench.other_runtime MODEL.gguf [--weights 1M]

Needs Node.js 20 with npm and about 400 MB in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nexus_ext import core
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime import plan_model
from nexus_ext.runtime.manifest import manifest
from nexus_ext.units import format_bytes, parse_bytes

PACKAGE = "node-llama-cpp@3.22.1"
PROGRAM = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const llama = await getLlama(
    {gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: process.argv[2], gpuLayers: 0});
const context = await model.createContext(
    {contextSize: 256, flashAttention: false, threads: 2});
const tokens = [model.tokens.bos, ...model.tokenize("Once upon a time")];
const out = [];
for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
    out.push(token);
    if (out.length === 32) break;
}
console.log(JSON.stringify(out));
await context.dispose();
await model.dispose();
await llama.dispose();
"""


def tokens(folder: Path, model: Path, environment: dict[str, str]) -> list[int]:
    done = subprocess.run(
        ["node", "program.mjs", str(model)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def from_nxf(folder: Path, model: Path, codec: str, weights: str) -> tuple[list[int], str]:
    """Return (tokens, what `nexus exec` says at its end) of the model as an NXF."""
    nxf = folder / f"{codec}.nxf"
    source = open_source(model)
    to_nxf(source, nxf, rules=Rules(codec))
    source.close()
    command = [sys.executable, "-m", "nexus_ext.cli", "exec", "--weights", weights, "-c", "256"]
    command += ["--model", str(nxf), "--", "node", "program.mjs", str(nxf)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nexus exec failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", default="1M")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    request = PlanRequest(weights_bytes=parse_bytes(arguments.weights), n_ctx=256)
    planned = plan_model(model, request)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["npm", "init", "-y"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["npm", "install", "--ignore-scripts", "--silent", PACKAGE], cwd=folder, check=True
        )
        (folder / "program.mjs").write_text(PROGRAM, encoding="utf-8")
        (folder / "manifest").write_text(manifest(planned.catalog, planned.plan, "direct"))
        stock = tokens(folder, model, {})
        report = folder / "report"
        paged = tokens(
            folder,
            model,
            {
                "GGML_BACKEND_PATH": str(core.BACKEND_PATH),
                "NEXUS_MANIFEST": str(folder / "manifest"),
                "NEXUS_REPORT": str(report),
            },
        )
        lines = dict(line.split(" ", 1) for line in report.read_text().splitlines() if " " in line)
        nxf = {c: from_nxf(folder, model, c, arguments.weights) for c in ("raw", "ans")}
    read = int(lines.get("stats", "0").split()[0])
    print(f"{PACKAGE} with ggml {lines.get('registered', '?')}")
    print(f"streamed {format_bytes(read)} of {model.name} under {arguments.weights} of weights")
    print("tokens", "identical" if paged == stock else f"differ: {stock} and {paged}")
    for codec, (found, accounting) in nxf.items():
        same = "identical" if found == stock else f"differ: {stock} and {found}"
        print(f"tokens of the NXF ({codec}) {same}; {accounting}")
    same = paged == stock and all(found == stock for found, _ in nxf.values())
    return 0 if same and read > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
