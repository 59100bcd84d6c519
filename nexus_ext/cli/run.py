"""`nexus run`: one prompt, streamed to stdout. A chat is in `chat`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from nexus_ext.cli import accounting
from nexus_ext.cli.library import model_at
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import Finite, PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.cli.sampling import SamplingOptions, sampling_options
from nexus_ext.cli.session import Session
from nexus_ext.errors import Interrupted, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.cli.session import Answer


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("-i", "--interactive", is_flag=True, help="Chat: ask, answer, ask again.")
@click.option("-sys", "--system", metavar="TEXT", help="What the model is told before the prompt.")
@click.option(
    "--chat/--no-chat",
    "as_chat",
    default=None,
    help="Write the prompt with the model's chat template, or leave it as it is.  "
    "[default: if the model has a template]",
)
@plan_options
@click.option("--plan", "plan_file", metavar="FILE", help="Use this plan (`nexus plan -o`).")
@click.option(
    "--kernels",
    type=click.Choice(["ggml", "auto", "nexus", "opencl"]),
    default="auto",
    help="Who multiplies by ternary weights; auto: nexus if the bits are the same."
    "  [default: auto]",
)
@click.option(
    "--pin-cores",
    is_flag=True,
    help="Bind each thread that computes to a processor of its own, physical cores first.",
)
@click.option(
    "--residual",
    "residual_file",
    metavar="FILE",
    help="Add back part of what quantization lost (`nexus quantize --residual`): other answers. "
    "An NXF may hold its own: name it here.",
)
@click.option(
    "--residual-share",
    type=Finite(0, 1),
    metavar="X",
    help="Part of the input channels to correct.  [default: what 5 % of time allow]",
)
@sampling_options
@output_options
def run(
    model: str,
    prompt: str | None,
    interactive: bool,
    system: str | None,
    as_chat: bool | None,
    planning: PlanOptions,
    plan_file: str | None,
    kernels: str,
    pin_cores: bool,
    residual_file: str | None,
    residual_share: float | None,
    choosing: SamplingOptions,
    output: Output,
) -> int:
    """Run MODEL, a file or a name (`nexus list`): answer PROMPT, or chat.

    PROMPT "-", or none when stdin is a pipe, is read from stdin. Without a prompt on a terminal a
    chat begins. The answer goes to stdout, everything else to stderr. Ctrl-C ends the answer.

    \b
    Examples:
      nexus run model.gguf --ram 4G "Once upon a time"
      nexus run qwen3:8b "Name a city."
      nexus run model.gguf --ram 4G -n 200 --temp 0 - < prompt.txt
      nexus run model.gguf --ram 4G -i --system "You are brief."
      nexus run model.gguf --plan plan.json --json-schema '{"type": "object"}' "Name a city."
    """
    planning.check_plan_file(plan_file)
    if interactive and output.mode == "json":
        raise UsageError("a chat has no JSON output", hint="leave out --json or -i")
    if prompt is None and not interactive:
        interactive = sys.stdin.isatty() and output.mode == "human"
    if prompt == "-" or (prompt is None and not interactive):
        prompt = _stdin_prompt()
    live = Live(output)
    stored = model_at(model)
    if stored is not None:
        choosing = choosing.with_parameters(stored.parameters)
        system = system if system is not None else stored.system
        n_ctx = stored.parameters.get("num_ctx")
        if planning.n_ctx is None and isinstance(n_ctx, int):
            planning = replace(planning, n_ctx=n_ctx)
    path = model if stored is None else stored.path
    residual = (residual_file, residual_share)
    opened = open_session(
        path, planning, plan_file, choosing.repeat_last_n, live, kernels, residual, pin_cores
    )
    with opened as session:
        if session.llm.nexus.own_kernels or kernels not in ("ggml", "auto"):
            from nexus_ext.runtime.own_kernels import describe

            output.note(describe(session.llm.nexus.own_kernels, kernels))
        if pin_cores:
            output.note(session.llm.nexus.pinning)
        if stored is not None and stored.template is not None:
            session.use_template(stored.template)
        with_template = session.has_template if as_chat is None else as_chat
        if interactive:
            from nexus_ext.cli.chat import chat

            return chat(session, choosing, system, with_template, prompt, output, live)
        assert prompt is not None
        tokens, stops = prompt_tokens(session, prompt, system, with_template)
        answer = answer_live(session, choosing, tokens, stops, live, choosing.grammar(session))
        live.end_line()
        output.note(accounting.line(answer))
        output.result(_fields(model, answer, choosing, session))
    return Interrupted.exit_status if answer.finish == "interrupted" else 0


def _stdin_prompt() -> str:
    """Return what is piped in, without the line break that ends it."""
    raw = sys.stdin.buffer.read()
    return raw.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def prompt_tokens(
    session: Session, prompt: str, system: str | None, with_template: bool
) -> tuple[list[int], list[str]]:
    """Return the tokens of one prompt, and the stops of the template if it is used."""
    if with_template:
        messages = [{"role": "system", "content": system}] if system else []
        return session.chat([*messages, {"role": "user", "content": prompt}])
    return session.complete(f"{system}\n\n{prompt}" if system else prompt), []


@contextmanager
def open_session(
    model: str,
    planning: PlanOptions,
    plan_file: str | None,
    repeat_last_n: int,
    live: Live,
    kernels: str = "auto",
    residual: tuple[str | None, float | None] = (None, None),
    pin_cores: bool = False,
) -> Iterator[Session]:
    """Plan, load and close a model, with progress on the terminal.

    `residual` is a file of residuals and the share of the channels to correct.
    """
    from nexus_ext.formats import open_model
    from nexus_ext.formats.ggml_types import ggml_types

    catalog = open_model(model)
    request = planning.request(catalog)
    # After the header was read: what is wrong with the file is said before llama.cpp is loaded.
    from nexus_ext.formats.residuals import read_residuals
    from nexus_ext.runtime import Llama
    from nexus_ext.runtime.residual import plan_with_room

    hardware = planning.hardware(model)
    file, share = residual
    table = read_residuals(file) if file is not None else None
    planned, table = plan_with_room(model, request, table, hardware=hardware, plan=plan_file)
    kv_types = {kind.name.lower(): number for number, kind in ggml_types().items()}

    def progress(done: int, total: int) -> None:
        live.status(f"loading {format_bytes(done)} of {format_bytes(total)}")

    n_threads = request.n_threads or own_cores()
    live.status("loading")
    llm = Llama(
        model,
        plan=planned.plan,
        hardware=hardware,
        progress=progress,
        kernels=kernels,
        pin_cores=pin_cores,
        n_ctx=request.n_ctx,
        n_batch=request.n_batch,
        n_ubatch=request.n_ubatch,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        type_k=kv_types[request.kv_type_k],
        type_v=kv_types[request.kv_type_v],
        flash_attn=request.flash_attn,
        residual=table.path if table is not None else None,
        residual_share=share,
        last_n_tokens_size=repeat_last_n,
        verbose=False,
    )
    try:
        live.clear()
        yield Session(llm, request.n_ctx)
    finally:
        llm.close()


def own_cores() -> int:
    """Return the cores of this machine, which --hardware may not describe."""
    from nexus_ext.hardware.cpu import read_cpu
    from nexus_ext.hardware.system import System

    return read_cpu(System()).n_usable_cores


def answer_live(
    session: Session,
    choosing: SamplingOptions,
    tokens: list[int],
    stops: list[str],
    live: Live,
    grammar: Any,
    *,
    seed_offset: int = 0,
) -> Answer:
    """Generate with the text and the progress on the terminal."""
    handle = session.llm.nexus
    begin = time.monotonic()
    count = 0

    def on_token(n_tokens: int) -> None:
        nonlocal count, begin
        count = n_tokens
        if n_tokens == 1:
            begin = time.monotonic()  # as the statistics: from the first token on

    def describe() -> str:
        stats = handle.stats() if handle.active else None
        elapsed = time.monotonic() - begin
        if count:
            return accounting.progress(count - 1, elapsed, stats)
        read = f", {format_bytes(stats.bytes_read)} read" if stats else ""
        return f"reading the prompt, {len(tokens)} tokens, {elapsed:.0f} s{read}"

    with live.ticking(describe):
        return session.generate(
            tokens,
            sampling=choosing.sampling,
            seed=choosing.seed + seed_offset,
            limit=choosing.n_predict,
            stops=(*choosing.stops, *stops),
            grammar=grammar,
            on_text=live.text,
            on_token=on_token,
        )


def _fields(
    model: str, answer: Answer, choosing: SamplingOptions, session: Session
) -> dict[str, object]:
    plan = session.llm.nexus.plan
    return {
        "model": model,
        "text": answer.text,
        "seed": choosing.seed,
        "n_ctx": session.n_ctx,
        "accounting": accounting.fields(answer),
        "plan": {
            "weights_bytes": plan.weights_bytes,
            "ram_bytes": plan.ram_bytes,
            "streamed_bytes_per_token": plan.streamed_bytes_per_token,
            "everything_fits": plan.everything_fits,
            "prediction": plan.prediction,
        },
    }
