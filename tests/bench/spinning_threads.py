"""What OpenMP's spinning threads cost beside one other busy program.

    python -m tests.bench.spinning_threads MODEL --weights 12M

Decodes with paged weights and with stock llama.cpp, for several GOMP_SPINCOUNT, on a quiet machine
and beside one process that keeps a core busy. libgomp reads the variable when it is loaded, so each
combination is a process of its own. Prints tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

SPIN_COUNTS = ("", "0", "1000", "10000")  # "": libgomp's own choice


def rates(model: str, weights: str, spin_count: str) -> tuple[float, float]:
    """Return (paged, stock) tokens a second."""
    environ = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    if spin_count:
        environ["GOMP_SPINCOUNT"] = spin_count
    command = [sys.executable, "-m", "nexus_ext.cli", "bench", model, "--weights", weights]
    options = ["-p", "32", "-n", "16", "--repeat", "3", "--baseline", "--json"]
    done = subprocess.run([*command, *options], env=environ, capture_output=True, check=True)
    result = json.loads(done.stdout)
    return (
        result["paged"]["decode_tok_s"]["median"],
        result["stock"]["decode_tok_s"]["median"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", required=True)
    args = parser.parse_args()
    model = os.path.abspath(args.model)
    print(f"{'machine':<8} {'GOMP_SPINCOUNT':<15} {'paged':>8} {'stock':>8}  tok/s")
    for machine in ("quiet", "busy"):
        busy = None
        if machine == "busy":
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            for spin_count in SPIN_COUNTS:
                paged, stock = rates(model, args.weights, spin_count)
                print(f"{machine:<8} {spin_count or 'default':<15} {paged:8.1f} {stock:8.1f}")
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()


if __name__ == "__main__":
    main()
