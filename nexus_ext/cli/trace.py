"""`nexus trace`: which experts a model uses, recorded for `nexus replay`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.cli.trace_predictors import Predictions, fields, show
from nexus_ext.errors import NexusError, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext import Llama
    from nexus_ext.placement import PlanRequest
    from nexus_ext.routing import RoutingTrace
    from nexus_ext.runtime.planning import Planned
    from nexus_ext.types import Catalog, TensorInfo

DEFAULT_CTX = 512  # tokens: all their logits are kept, see _traceable
DEFAULT_N = 64


@click.command()
@click.argument("model", type=MODEL)
@click.argument("prompt", required=False)
@click.option("-o", "--output", "file", metavar="FILE", required=True, help="Write the trace here.")
@click.option(
    "-f",
    "--prompt-file",
    metavar="TEXT",
    help="Record what this text uses, in windows of the context.",
)
@click.option(
    "-n",
    "--n-predict",
    "n_predict",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"Tokens to generate after the text.  [default: {DEFAULT_N}; 0 after a file]",
)
@click.option(
    "--predictors",
    is_flag=True,
    help="Also tell how well experts could have been predicted, layer by layer.",
)
@plan_options
@output_options
def trace(
    model: str,
    prompt: str | None,
    file: str,
    prompt_file: str | None,
    n_predict: int | None,
    predictors: bool,
    planning: PlanOptions,
    output: Output,
) -> None:
    """Record which experts MODEL uses for a text and for what it answers.

    The experts are streamed or cached, whatever the budget: routing is seen where they are read.
    The decisions are those of any other budget. Without --ctx the context is 512 tokens.

    \b
    Examples:
      nexus trace model.gguf --ram 8G -o model.nxtrace --prompt-file text.txt
      nexus trace model.gguf -o model.nxtrace -n 200 "Once upon a time"
      nexus trace model.gguf -o model.nxtrace --predictors --prompt-file text.txt
    """
    from nexus_ext.formats import open_model
    from nexus_ext.routing import repeats

    text = _text(prompt, prompt_file)
    if n_predict is None:
        n_predict = DEFAULT_N if prompt_file is None else 0
    catalog = open_model(model)
    if planning.n_ctx is None:
        planning = replace(planning, n_ctx=min(DEFAULT_CTX, planning.context_tokens(catalog)))
    planned, request = _traceable(model, planning, catalog)
    live = Live(output)
    with _loaded(model, planned, request) as llm:
        predictions = Predictions(len(_layers(catalog))) if predictors else None
        found = record(llm, planned, text, request.n_ctx, n_predict, live, predictions)
    live.clear()
    accuracies = predictions.accuracies(found) if predictions else []
    data = found.to_bytes()
    repeated = repeats(found)
    _write(file, data)
    output.line(
        f"{found.n_tokens} tokens in {len(found.passes)} passes, {len(found.layers)} layers; "
        f"a token uses {format_bytes(found.token_bytes)} of {format_bytes(found.expert_bytes)} "
        f"of experts, {repeated:.0%} of them those of the token before"
    )
    if predictors:
        show(accuracies, output)
    output.note(f"The trace is in {file} ({format_bytes(len(data))}): nexus replay {file}")
    output.result(
        {
            "model": model,
            "file": file,
            "file_bytes": len(data),
            "fingerprint": found.fingerprint,
            "n_tokens": found.n_tokens,
            "n_passes": len(found.passes),
            "n_layers": len(found.layers),
            "token_bytes": found.token_bytes,
            "expert_bytes": found.expert_bytes,
            "repeats": repeated,
            "predictors": fields(accuracies),
        }
    )


def _text(prompt: str | None, prompt_file: str | None) -> bytes:
    if (prompt is None) == (prompt_file is None):
        raise UsageError(
            "a trace needs one text: a PROMPT or --prompt-file",
            hint="leave out one of them" if prompt is not None else "give one of them",
        )
    if prompt is not None:
        return prompt.encode("utf-8", "surrogateescape")
    assert prompt_file is not None
    try:
        return Path(prompt_file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"the text {prompt_file!r} cannot be read: {error.strerror}", hint="name a text file"
        ) from error


def _write(file: str, data: bytes) -> None:
    try:
        Path(file).write_bytes(data)
    except OSError as error:
        raise UsageError(
            f"the trace cannot be written to {file!r}: {error.strerror}",
            hint="name a file in a directory that exists and can be written",
        ) from error


def _traceable(model: str, planning: PlanOptions, catalog: Catalog) -> tuple[Planned, PlanRequest]:
    """Return a plan that keeps no experts in memory for good: only streamed ones are seen."""
    from nexus_ext.placement import Pin
    from nexus_ext.runtime import plan_model

    names = [tensor.name for parts in _layers(catalog) for tensor in parts]
    if not names:
        raise UsageError(
            f"{model} has no experts, so there is no routing to record",
            hint="trace a mixture of experts; `nexus inspect` shows what a model is",
        )
    # With all logits, because llama.cpp computes the last layer for tokens with logits alone.
    request = replace(planning.request(catalog), logits_all=True)
    hardware = planning.hardware(model)
    planned = plan_model(model, request, hardware=hardware)
    if any(planned.plan.tiers[name] != "nvme" for name in names):
        pin = Pin(f"^(?:{'|'.join(map(re.escape, names))})$", "nvme")
        request = replace(request, pins=(pin, *request.pins))
        planned = plan_model(model, request, hardware=hardware)
    return planned, request


def _layers(catalog: Catalog) -> list[tuple[TensorInfo, ...]]:
    from nexus_ext.placement.experts import groups

    return groups(catalog.tensors)


@contextmanager
def _loaded(model: str, planned: Planned, request: PlanRequest) -> Iterator[Llama]:
    """A model for the time of a trace."""
    from nexus_ext.cli.run import own_cores
    from nexus_ext.formats.ggml_types import ggml_types
    from nexus_ext.runtime import Llama

    kv_types = {kind.name.lower(): number for number, kind in ggml_types().items()}
    n_threads = request.n_threads or own_cores()
    llm = Llama(
        model,
        plan=planned.plan,
        hardware=planned.hardware,
        warm_start=False,
        n_ctx=request.n_ctx,
        n_batch=request.n_batch,
        n_ubatch=request.n_ubatch,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        type_k=kv_types[request.kv_type_k],
        type_v=kv_types[request.kv_type_v],
        flash_attn=request.flash_attn,
        logits_all=True,
        verbose=False,
    )
    try:
        yield llm
    finally:
        llm.close()


def record(
    llm: Any,
    planned: Planned,
    text: bytes,
    n_ctx: int,
    n_predict: int,
    live: Live,
    predictions: Predictions | None = None,
) -> RoutingTrace:
    """Evaluate `text` in windows of the context, then generate; return what the routers decided.

    What they would have decided one layer earlier goes to `predictions`.
    """
    from nexus_ext.core import GATE_ROUTED
    from nexus_ext.placement.experts import slot_bytes
    from nexus_ext.routing import RoutingTrace, TracedLayer

    model = llm.nexus.model
    assert model is not None  # the experts are streamed
    catalog = planned.catalog
    number = {tensor.name: i for i, tensor in enumerate(catalog.tensors)}
    layers = _layers(catalog)
    # Without a cache each product of a layer is recorded: the first stands for all.
    place = {number[parts[0].name]: i for i, parts in enumerate(layers)}
    decisions = [bytearray() for _ in layers]
    widths = [1 if parts[0].n_experts <= 256 else 2 for parts in layers]
    n_used = [0] * len(layers)
    passes: list[int] = []
    n_tokens = 0
    if llm.nexus.router_watch is not None:
        llm.nexus.router_watch.stop()  # a plugin's: what it takes, the trace would miss
    model.record_routing(True, predictions=predictions is not None)
    for n_evaluated in _run(llm, text, n_ctx, n_predict):
        n_tokens += n_evaluated
        while entries := model.take_routing():
            for number_and_kind, tokens in entries:
                kind, extent = divmod(number_and_kind, GATE_ROUTED)
                layer = place.get(extent)
                if layer is None:
                    continue
                if kind:
                    assert predictions is not None  # or none are recorded
                    predictions.add(kind, layer, tokens)
                    continue
                for experts in tokens:
                    n_used[layer] = len(experts)
                    for expert in experts:
                        decisions[layer] += expert.to_bytes(widths[layer], "little")
                if layer == 0:
                    passes.append(len(tokens))
        live.status(f"{n_tokens} tokens")
    model.record_routing(False)
    traced = []
    for parts, data, used, width in zip(layers, decisions, n_used, widths, strict=True):
        layer_number = parts[0].layer
        assert layer_number is not None
        if not used or len(data) != n_tokens * used * width:
            raise NexusError(
                f"layer {layer_number} has {len(data)} bytes of decisions for {n_tokens} tokens",
                hint="this is a bug: report it with the model's architecture",
            )
        traced.append(
            TracedLayer(
                layer=layer_number,
                n_experts=parts[0].n_experts,
                n_used=used,
                record_bytes=sum(t.nbytes // t.n_experts for t in parts),
                slot_bytes=slot_bytes(parts),
                experts=bytes(data),
            )
        )
    mean_bytes = sum(layer.record_bytes for layer in traced) // len(traced)
    return RoutingTrace(
        fingerprint=catalog.fingerprint,
        architecture=catalog.shape.architecture,
        passes=tuple(passes),
        layers=tuple(traced),
        disk_bytes_s=planned.hardware.disk.random_bytes_s(mean_bytes),
        compute_s=planned.plan.prediction.compute_s,
    )


def _run(llm: Any, text: bytes, n_ctx: int, n_predict: int) -> Iterator[int]:
    """Evaluate and generate; yield how many tokens were evaluated, a window or one at a time."""
    import numpy as np

    room = n_ctx - n_predict  # llm.n_ctx() may have been rounded up beyond llama_cpp's own arrays
    if room < 1:
        raise UsageError(
            f"{n_predict} tokens do not fit in a context of {n_ctx}",
            hint="give a larger --ctx or a smaller -n",
        )
    tokens = llm.tokenize(text)
    if not tokens:
        raise UsageError("the text has no tokens", hint="give a text that is not empty")
    for begin in range(0, len(tokens), room):
        window = tokens[begin : begin + room]
        llm.reset()
        llm.eval(window)
        yield len(window)
    for _ in range(n_predict):
        token = int(np.argmax(llm.scores[llm.n_tokens - 1]))
        if token == llm.token_eos():
            return
        llm.eval([token])
        yield 1
