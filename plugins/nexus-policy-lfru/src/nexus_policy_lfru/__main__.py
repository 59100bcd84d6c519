"""Hit rates of the policy on traces, beside those of nexus_ext's policies and Belady's optimum.

    python -m nexus_policy_lfru [TRACE ...]

Without traces of `nexus trace`: those that come with nexus_ext (a small trained mixture of
experts), and drawn ones. For caches that hold a quarter, half and three quarters of each layer's
experts. The last column is how much of the way from "lfru", which counts over one span, to the
optimum this one goes; below 0 it does worse than "lfru".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from nexus_ext.routing import BELADY, DEFAULT, Replay, RoutingTrace, replay
from nexus_ext.testing import RECORDED, recorded_trace, replay_trace, synthetic_trace
from nexus_policy_lfru import native_policy

SHARES = (0.25, 0.5, 0.75)
BUILT_IN = ("lfru", DEFAULT, "lru", "lfu", "least-stale")


def traces(files: list[str]) -> Iterator[tuple[str, RoutingTrace]]:
    for file in files:
        yield Path(file).stem, RoutingTrace.from_bytes(Path(file).read_bytes(), source=file)
    if files:
        return
    for name in RECORDED:
        yield name, recorded_trace(name)
    yield "popular", synthetic_trace(3000, 64, 6, zipf=0.8)
    yield "popular, reused", synthetic_trace(3000, 64, 6, zipf=0.8, reuse=0.5)
    yield "reused", synthetic_trace(3000, 64, 6, reuse=0.5)
    yield "topics of 256", synthetic_trace(3000, 64, 6, zipf=1.0, topic=256)
    yield "topics of 64", synthetic_trace(3000, 128, 8, zipf=1.2, topic=64, reuse=0.3)


def by_cache(trace: RoutingTrace, policy: str, slots: Sequence[int]) -> Replay:
    return replay_trace(trace, policy, slots)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    policy = native_policy()
    print(f"{'trace':<20} {'slots':>7} {'this':>6}", end="")
    print("".join(f" {name:>11}" for name in (*BUILT_IN, BELADY)), f"{'of the way':>11}")
    for name, trace in traces(parser.parse_args().traces):
        layer = trace.layers[0]
        for slots in sorted({int(layer.n_experts * share) for share in SHARES}):
            sizes = [slots] * len(trace.layers)
            ours, disabled = replay_trace(trace, policy, sizes)
            if disabled:
                raise RuntimeError(f"{policy.name} was disabled: {disabled[0]}")
            [found] = replay(trace, [*BUILT_IN, BELADY], [sizes], by_code=by_cache)
            lfru, best = found[0].hit_rate, found[-1].hit_rate
            way = (ours.hit_rate - lfru) / (best - lfru) if best > lfru else 0.0
            rates = "".join(f" {result.hit_rate:>11.1%}" for result in found)
            where = f"{name[:20]:<20} {slots:>3}/{layer.n_experts:<3}"
            print(f"{where} {ours.hit_rate:>6.1%}{rates} {way:>11.1%}", flush=True)


if __name__ == "__main__":
    main()
