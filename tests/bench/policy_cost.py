"""What a decision of a cache policy costs: built in, in C, and in Python.

    python -m tests.bench.policy_cost [--tokens N]

Replays a trace with popular experts through the code of the cache, layers of several sizes, and
divides what the functions of the policy took by their calls: `used` for each token and layer,
`victims` for each that evicts something. The policy in C and the one in Python both evict what was
not used for longest; "history" is nexus-policy-lfru. The last column is what 48 layers would add to
a token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nexus_ext.native_plugins import CachePolicyLike, replay
from nexus_ext.policies import EvictionAsk
from nexus_ext.routing.replay import decisions
from nexus_ext.testing import synthetic_trace
from tests.native_plugin import LRU, compiled, native

LAYERS = 48
REPEATS = 5
SIZES = ((32, 4, 12), (128, 8, 48), (256, 8, 96))  # experts, used by a token, slots


class Oldest:
    name = "python"

    def used(self, layer: int, experts: Sequence[int]) -> None:
        pass

    def victims(self, ask: EvictionAsk) -> list[int]:
        order = sorted(range(len(ask.ages)), key=ask.ages.__getitem__, reverse=True)
        return [ask.experts[i] for i in order[: ask.n_wanted]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000)
    n_tokens = parser.parse_args().tokens
    print(f"{'policy':<10} {'experts':>8} {'slots':>6} {'hits':>7} {'us/call':>8} {'us/token':>9}")
    with tempfile.TemporaryDirectory() as directory:
        in_c = native(compiled(Path(directory), LRU))
        source = Path(__file__).parents[2] / "plugins" / "nexus-policy-lfru" / "native" / "policy.c"
        history = compiled(Path(directory), source.read_text(encoding="utf-8"), "history")
        policies: tuple[tuple[str, CachePolicyLike], ...] = (
            ("lru", "lru"),
            ("lfru", "lfru"),
            ("adaptive", "adaptive"),
            ("in C", in_c),
            ("history", native(history, "nexus_policy_lfru")),
            ("in Python", Oldest()),
        )
        for n_experts, n_used, slots in SIZES:
            trace = synthetic_trace(n_tokens, n_experts, n_used, zipf=0.8, reuse=0.3, n_layers=1)
            used = [[e for e in row if e >= 0] for row in decisions(trace)[:, 0].tolist()]
            for name, policy in policies:
                runs = [replay(policy, used, n_experts, slots) for _ in range(REPEATS)]
                misses, use = min(runs, key=lambda run: run[1].ns)  # the least disturbed one
                assert not use.why, use.why
                hits = 1 - misses / sum(map(len, used))
                each = use.ns / use.calls / 1e3
                token = LAYERS * use.ns / len(used) / 1e3
                print(
                    f"{name:<10} {n_experts:>8} {slots:>6} {hits:>7.1%} {each:>8.2f} {token:>9.1f}"
                )


if __name__ == "__main__":
    main()
