"""Predictors of experts that were trained from traces, beside the gate and beside doing nothing.

    python -m tests.bench.learned_predictors --model tinymoe-41M-Q4_K_M.gguf --text stories.txt

Records which experts the model uses for the text, trains the plugins nexus-predictor-markov and
nexus-predictor-lstm with the beginning, and compares on the rest (`--held-out`), which none of them
has seen: the built-in prediction by the next layer's gate, what was used most in training, what the
token before used. Then the same models decode the rest of the text with each predictor in turn,
A B C A B C in one process, through a cache of `--share` percent of the experts with direct reads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext.cli.live import Live
from nexus_ext.cli.options import PlanOptions
from nexus_ext.cli.output import Output
from nexus_ext.cli.trace import _loaded, _traceable, record
from nexus_ext.cli.trace_predictors import Predictions
from nexus_ext.core import ModelStats
from nexus_ext.formats import open_model
from nexus_ext.placement.experts import groups
from nexus_ext.routing import RoutingTrace, compare, rank_popular, rank_previous, score, split
from nexus_ext.runtime.disk_sample import drop_files
from nexus_ext.units import format_bytes
from tests.bench.plugins_path import add_plugins
from tests.integration.test_experts import cached, core_model

add_plugins()

from nexus_predictor_lstm.follower import Follower as LstmFollower  # noqa: E402
from nexus_predictor_lstm.train import Settings  # noqa: E402
from nexus_predictor_lstm.train import train as train_lstm  # noqa: E402
from nexus_predictor_markov.chain import train as train_markov  # noqa: E402
from nexus_predictor_markov.follower import Follower as MarkovFollower  # noqa: E402

WARMUP = 64  # tokens that fill the cache


def recorded(model: Path, text: bytes) -> tuple[RoutingTrace, np.ndarray]:
    """Return what the routers decided, and what the gates said one layer earlier, -1: nothing."""
    catalog = open_model(str(model))
    planning = PlanOptions(
        *(None, None, 0, (), "auto", None, 512, 512, 512),
        n_threads=2,
        kv_type_k="f16",
        kv_type_v="f16",
        flash_attn=True,
    )
    planned, request = _traceable(str(model), planning, catalog)
    n_layers = len(groups(catalog.tensors))
    predictions = Predictions(n_layers)
    with _loaded(str(model), planned, request) as llm:
        trace = record(llm, planned, text, request.n_ctx, 0, Live(Output("quiet")), predictions)
    n_used = max(layer.n_used for layer in trace.layers)
    gate = np.full((trace.n_tokens, n_layers, n_used), -1, np.int64)
    for i, said in enumerate(predictions._said):
        picks = said.get("gate", [])
        if len(picks) == trace.n_tokens:
            gate[:, i] = picks
    return trace, gate


def later(ranked: np.ndarray, n: int) -> np.ndarray:
    """What was said of a token, taken for the one `n` tokens later: predicting further ahead."""
    out = np.full_like(ranked, -1)
    out[n:] = ranked[:-n]
    return out


def score_of_first(trace: RoutingTrace, rankings: dict[str, np.ndarray]) -> str:
    """Return how well the first layer could be told before a token is computed."""
    scores = {name: score(name, trace, ranked)[0] for name, ranked in rankings.items()}
    number = trace.layers[0].layer
    return ", ".join(f"{n} {s.slots:.1%}" for n, s in scores.items() if s.layer == number)


@dataclass(slots=True)
class Side:
    """One predictor, and what its blocks took."""

    predictor: Any
    seconds: list[float]
    before: list[ModelStats]
    after: list[ModelStats]

    def per_token(self, name: str, n: int) -> float:
        pairs = zip(self.before, self.after, strict=True)
        return sum(getattr(b, name) - getattr(a, name) for a, b in pairs) / (n * len(self.before))


def decode(llm: Any, tokens: list[int], n_ctx: int) -> float:
    """Feed tokens one at a time; return seconds."""
    if llm.n_tokens + len(tokens) >= n_ctx:
        llm.reset()
    begin = time.perf_counter()
    for token in tokens:
        llm.eval([token])
    return time.perf_counter() - begin


def live(path: Path, text: bytes, sides: dict[str, Any], slots: int, rounds: int, n: int) -> None:
    drop_files([str(path)])
    n_ctx = 512
    with cached(path, slots, n_ctx=n_ctx, n_threads=2, logits_all=False) as llm:
        model = core_model(llm)
        tokens = llm.tokenize(text)
        model.set_predictor("none")
        decode(llm, tokens[:WARMUP], n_ctx)
        runs = {name: Side(predictor, [], [], []) for name, predictor in sides.items()}
        at = WARMUP
        for _ in range(rounds):
            for side in runs.values():
                model.set_predictor(side.predictor)
                decode(llm, tokens[at : at + 2], n_ctx)  # the network's state fills up again
                part = tokens[at + 2 : at + 2 + n]
                if len(part) < n:
                    raise SystemExit("the held-out text is too short for so many rounds")
                side.before.append(model.stats())
                side.seconds.append(decode(llm, part, n_ctx))
                side.after.append(model.stats())
                at = (at + 2 + n) % max(len(tokens) - n - 2, 1)
    base = runs["none"].seconds
    print(
        f"\ndecoding, {slots} slots a layer, {rounds} blocks of {n} tokens each in turn; a token:"
    )
    print(
        f"{'':>9}{'tok/s':>9}{'x none':>8}{'wait ms':>9}{'idle ms':>9}{'own ms':>8}{'hits':>7}"
        f"{'useful':>8}{'wasted':>11}{'read':>11}"
    )
    for name, side in runs.items():
        pairs = [b / a for a, b in zip(base, side.seconds, strict=True)]
        started = side.per_token("prefetched", n)
        useful = f"{side.per_token('prefetch_used', n) / started:.0%}" if started else "-"
        hits = 1 - side.per_token("expert_misses", n) / side.per_token("expert_uses", n)
        print(
            f"{name:>9}{n / statistics.median(side.seconds):>9.1f}{statistics.median(pairs):>8.3f}"
            f"{side.per_token('wait_ns', n) / 1e6:>9.2f}{side.per_token('idle_ns', n) / 1e6:>9.2f}"
            f"{side.per_token('predict_ns', n) / 1e6:>8.3f}{hits:>7.1%}{useful:>8}"
            f"{format_bytes(side.per_token('prefetch_wasted', n)):>11}"
            f"{format_bytes(side.per_token('bytes_read', n)):>11}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a trained mixture of experts")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--most-bytes", type=int, default=400_000, help="of the text")
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--share", type=int, default=50, help="percent of experts with a slot")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=8, help="0: nothing is decoded")
    parser.add_argument("--tokens", type=int, default=32, help="of a block")
    args = parser.parse_args()
    os.environ["NEXUS_CACHE_DIR"] = tempfile.mkdtemp()
    text = args.text.read_bytes()[: args.most_bytes]
    trace, gate = recorded(args.model, text)
    learned, held_out = split(trace, args.held_out)
    gate = gate[learned.n_tokens :]
    print(
        f"{args.model.name}, {args.text.name}: trained with {learned.n_tokens} tokens, compared on "
        f"{held_out.n_tokens}"
    )
    begin = time.perf_counter()
    chain = train_markov(learned)
    print(
        f"markov: trained in {time.perf_counter() - begin:.1f} s, "
        f"{format_bytes(len(chain.learned().to_bytes()))}; the token before counts "
        f"{chain.time_weight:g}, the layer before {chain.layer_weight:g}"
    )
    networks = {}
    for name, use_above in (("lstm", True), ("lstm past", False)):
        begin = time.perf_counter()
        settings = Settings(n_hidden=args.hidden, n_epochs=args.epochs, use_above=use_above)
        network = networks[name] = train_lstm(learned, settings)
        print(
            f"{name}: trained in {time.perf_counter() - begin:.1f} s, "
            f"{format_bytes(len(network.learned().to_bytes()))}"
        )
    rankings = {
        "gate": gate,
        "markov": chain.rank(held_out),
        **{name: network.rank(held_out) for name, network in networks.items()},
        "lstm +2": later(networks["lstm past"].rank(held_out), 2),
        "popular": rank_popular(learned, held_out).copy(),
        "previous": rank_previous(held_out),
    }
    first = score_of_first(held_out, rankings)
    for ranked in rankings.values():
        ranked[:, 0] = -1  # no layer is computed before the first: nobody is asked for it
    slots = max(chain.shape.n_experts * args.share // 100, chain.shape.n_used)
    print("\n".join(compare(held_out, rankings, slots).lines()))
    print(f"the first layer, which is not read ahead: {first}", flush=True)
    if args.rounds:
        sides = {
            "none": "none",
            "gate": "gate",
            "markov": MarkovFollower(chain, chain.shape.layers),
            "lstm": LstmFollower(networks["lstm"]),
            "popular": "popular",
            "previous": "previous",
        }
        for side in sides.values():
            if not isinstance(side, str):
                side.automatic = False
        rest = text[round(len(text) * (1 - args.held_out)) :]
        live(args.model, rest, sides, slots, args.rounds, args.tokens)


if __name__ == "__main__":
    main()
