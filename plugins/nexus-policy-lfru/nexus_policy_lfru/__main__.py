"""Hit rates of the policy on recorded traces, beside those of nexus_ext and of Belady's optimum.

    python -m nexus_policy_lfru TRACE ...

For caches that hold 1/8 to 7/8 of the experts of each layer. The last column says how much of the
way from the default to the optimum the policy goes; below 0 it is worse than the default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nexus_ext.native_plugins import replay as replay_layer
from nexus_ext.routing import RoutingTrace, replay
from nexus_ext.routing.replay import decisions
from nexus_policy_lfru import native_policy

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
BUILT_IN = ("lfru", "lru", "lfu", "least-stale")


def hit_rate(trace: RoutingTrace, slots: int) -> float:
    """Return the part of the experts used that this policy has in `slots` slots of each layer."""
    used = decisions(trace)
    policy = native_policy()
    misses = uses = 0
    for i, layer in enumerate(trace.layers):
        tokens = [[e for e in row if e >= 0] for row in used[:, i].tolist()]
        missed, use = replay_layer(policy, tokens, layer.n_experts, slots, layer=i)
        if use.why:
            raise RuntimeError(f"{use.name} was disabled: {use.why}")
        misses += missed
        uses += sum(map(len, tokens))
    return 1 - misses / uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE")
    print(f"{'trace':<20} {'slots':>5} {'this':>6}", end="")
    print("".join(f" {name:>12}" for name in (*BUILT_IN, "belady")), f"{'of the way':>11}")
    for file in parser.parse_args().traces:
        trace = RoutingTrace.from_bytes(Path(file).read_bytes(), source=file)
        layer = trace.layers[0]
        sizes = sorted({int(layer.n_experts * share) for share in SHARES})
        for slots in (n for n in sizes if n > layer.n_used):
            ours = hit_rate(trace, slots)
            [found] = replay(trace, [*BUILT_IN, "belady"], [[slots] * len(trace.layers)])
            default, best = found[0].hit_rate, found[-1].hit_rate
            way = (ours - default) / (best - default) if best > default else 0.0
            rates = "".join(f" {result.hit_rate:>12.1%}" for result in found)
            print(f"{Path(file).stem[:20]:<20} {slots:>5} {ours:>6.1%}{rates} {way:>11.1%}")


if __name__ == "__main__":
    main()
