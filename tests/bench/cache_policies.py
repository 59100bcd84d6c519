"""Which policy for the cache of experts: hits of each, beside Belady's optimum.

    python -m tests.bench.cache_policies [TRACE ...] [--tokens N]

Replays recorded traces (`nexus trace`; without any, those that come with nexus_ext) and synthetic
ones through the code of the cache. Synthetic traces
have popular experts (Zipf's law with an exponent), reuse from token to token (each expert of the
last token is kept with a probability), or topics (popularity that is drawn anew every so often,
all at once: harsher than text). Prints hit rates in percent for sizes above one token's experts,
and how far the default is from the best other online policy, from LRU and from the optimum. Where
experts are drawn evenly nothing but reuse can be predicted: there all policies that keep what was
just used are equal, and what is printed is the noise of the draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nexus_ext.native_plugins import replay_builtin
from nexus_ext.routing import BELADY, DEFAULT, ONLINE, RoutingTrace, replay
from nexus_ext.testing import RECORDED, recorded_trace, synthetic_trace

OTHERS = [name for name in ONLINE if name != DEFAULT]
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
SYNTHETIC: tuple[tuple[str, dict[str, float]], ...] = (
    *((f"zipf {z}", {"zipf": z}) for z in (0.5, 0.8, 1.0, 1.2)),
    *((f"reuse {r}", {"reuse": r}) for r in (0.2, 0.5, 0.8)),
    *((f"zipf 0.8, reuse {r}", {"zipf": 0.8, "reuse": r}) for r in (0.2, 0.5, 0.8)),
    ("topics of 256, zipf 1", {"zipf": 1.0, "topic": 256}),
    ("topics of 64, zipf 1.2", {"zipf": 1.2, "topic": 64, "reuse": 0.3}),
)
EXPERTS = ((32, 4), (64, 6), (128, 8))  # in a layer, and used by a token


def first_tokens(trace: RoutingTrace, n: int) -> RoutingTrace:
    """Return the beginning of a trace, token by token."""
    n = min(n, trace.n_tokens)
    layers = tuple(
        replace(layer, experts=layer.experts[: n * layer.n_used * layer.width])
        for layer in trace.layers
    )
    return replace(trace, passes=(1,) * n, layers=layers)


def traces(files: list[str], n_tokens: int) -> Iterator[tuple[str, RoutingTrace]]:
    for file in files:
        found = RoutingTrace.from_bytes(Path(file).read_bytes(), source=file)
        yield Path(file).name, first_tokens(found, n_tokens)
    for name in () if files else RECORDED:
        yield name, recorded_trace(name)
    for n_experts, n_used in EXPERTS:
        for name, options in SYNTHETIC:
            drawn = synthetic_trace(n_tokens, n_experts, n_used, **options)  # type: ignore[arg-type]
            yield f"{name}, {n_experts}/{n_used}", drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=3000)
    arguments = parser.parse_args()
    policies = [*ONLINE, BELADY]
    titles = " ".join(f"{name:>11}" for name in policies)
    print(f"{'trace':<34} {'slots':>5} {titles} {'to best':>8} {'to lru':>7} {'to Belady':>10}")
    worst_best = worst_lru = (-100.0, "")
    for name, trace in traces(arguments.files, arguments.tokens):
        layer = trace.layers[0]
        slots = sorted({int(layer.n_experts * share) for share in SHARES})
        sizes = [[n] * len(trace.layers) for n in slots if n > layer.n_used]
        best = replay(trace, [BELADY], sizes)
        for size, found in zip(sizes, best, strict=True):
            found += [replay_builtin(trace, policy, size) for policy in ONLINE]
            hits = {result.policy: 100 * result.hit_rate for result in found}
            to_best = max(hits[other] for other in OTHERS) - hits[DEFAULT]
            to_lru = hits["lru"] - hits[DEFAULT]
            rates = " ".join(f"{hits[policy]:11.1f}" for policy in policies)
            print(
                f"{name:<34} {size[0]:>5} {rates} {to_best:8.1f} {to_lru:7.1f} "
                f"{hits[BELADY] - hits[DEFAULT]:10.1f}",
                flush=True,
            )
            where = f"{name}, {size[0]} slots"
            worst_best = max(worst_best, (to_best, where))
            worst_lru = max(worst_lru, (to_lru, where))
    print(f"\n{DEFAULT} below the best other: at most {worst_best[0]:.1f} ({worst_best[1]})")
    print(f"{DEFAULT} below LRU: at most {worst_lru[0]:.1f} ({worst_lru[1]})")


if __name__ == "__main__":
    main()
