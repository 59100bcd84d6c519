"""What an installed plugin adds to every start: finding entry points, importing, registering.

    pip install plugins/nexus-*            # or those that are to be measured
    python -m tests.bench.plugin_startup [--rounds N] [--many N]

Starts processes in turn: one that leaves plugins out, one with those that are installed here, and
one with `--many` small ones more. They list plugins, as `nexus --help` does. The median of each is
printed, by the clock and in CPU time.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = "import nexus_ext; nexus_ext.list_plugins()"
PLUGIN = """
from nexus_ext import hookimpl
@hookimpl
def nexus_request_done(info):
    pass
"""


def install_many(folder: Path, n: int) -> None:
    """Lay out `n` distributions with one plugin each, as an installer does."""
    for i in range(n):
        (folder / f"small_{i}.py").write_text(PLUGIN, encoding="utf-8")
        info = folder / f"small_{i}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: small-{i}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nexus_ext]\nsmall-{i} = small_{i}\n")


def start(environ: dict[str, str]) -> tuple[float, float]:
    """Return the seconds that a process takes: by the clock, and of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", CODE], env={**os.environ, **environ}, check=True)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--many", type=int, default=20)
    arguments = parser.parse_args()
    os.environ.pop("NEXUS_LOAD_PLUGINS", None)
    with tempfile.TemporaryDirectory() as folder:
        install_many(Path(folder), arguments.many)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), folder)))
        sides = {
            "without plugins": {"NEXUS_LOAD_PLUGINS": "none"},
            "those installed": {},
            f"{arguments.many} small ones more": {"PYTHONPATH": path},
        }
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for environ in sides.values():  # compiles what is imported
            start(environ)
        for _ in range(arguments.rounds):
            for side, environ in sides.items():
                taken[side].append(start(environ))
    for side, times in taken.items():
        clock, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{side:<24} {clock * 1e3:7.1f} ms, {cpu * 1e3:6.1f} ms of CPU")


if __name__ == "__main__":
    main()
