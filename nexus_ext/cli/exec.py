"""`nexus exec`: another llama.cpp program, with paged weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.options import PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import BackendUnavailable, DoesNotFit, ReadFailed, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.runtime.foreign import ForeignRun
    from nexus_ext.runtime.planning import Planned


@click.command("exec")
@click.option("-m", "--model", metavar="FILE", help="The model.  [default: COMMAND's own -m]")
@plan_options
@click.option("--plan", "plan_file", metavar="FILE", help="Use this plan (`nexus plan -o`).")
@output_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    model: str | None,
    planning: PlanOptions,
    plan_file: str | None,
    command: tuple[str, ...],
    output: Output,
) -> int:
    """Run COMMAND, a llama.cpp program, with the model's weights paged by nexus_ext.

    The program must load the library that GGML_BACKEND_PATH names. llama.cpp built with
    GGML_BACKEND_DL does (its releases are). Signals go to the program, and its exit status comes
    back; if it never used the backend, this fails. Context and batch size are taken from COMMAND.

    While weights are paged llama.cpp turns "flash attention: auto" into off: say -fa on or -fa off.

    An NXF works as a GGUF does: where the program is given its path, it gets that of a small file
    instead, which has the header, and whose weights the backend reads from the NXF.

    \b
    Examples:
      nexus exec --ram 6G -- llama-server -m model.gguf -c 8192 -fa off
      nexus exec --weights 2G --model model.gguf -- ./my-program
    """
    from nexus_ext.runtime import foreign

    planning.check_plan_file(plan_file)
    path = model or foreign.command_option(command, "model")
    if path is None:
        raise UsageError(
            f"the model that {command[0]} will load is not known", hint="name it with --model FILE"
        )
    planned = _plan(path, _as_command(planning, command), plan_file)
    if planned.plan.everything_fits and planned.catalog.chunks is None:
        output.note("nexus: everything fits; the program runs as it is")
        return foreign.run_plain(command)
    streamed = planned.plan.streamed_bytes_per_token
    output.note(
        f"nexus: {format_bytes(planned.plan.weights_bytes)} for weights, "
        f"{format_bytes(streamed)} streamed per token ({planned.io_mode})"
    )
    run = foreign.run_foreign(command, planned, tell=lambda text: output.note(f"nexus: {text}"))
    return _judge(run, command, output)


def _as_command(planning: PlanOptions, command: tuple[str, ...]) -> PlanOptions:
    """What the command says of its memory counts where the options say nothing."""
    from nexus_ext.runtime.foreign import command_number

    defaults = {p.name: p.default for p in exec_.params}
    said = {name: command_number(command, name) for name in ("n_ctx", "n_batch", "n_ubatch")}
    taken = {
        name: number
        for name, number in said.items()
        # 0 is "as trained" for a context, and no size of a batch.
        if number is not None
        and (number or name == "n_ctx")
        and getattr(planning, name) == defaults[name]
    }
    # The program's own -ngl decides what goes to a GPU, and what the plan pages cannot.
    gpu_bytes = 0 if planning.gpu_bytes is None else planning.gpu_bytes
    return replace(
        planning,
        gpu_bytes=gpu_bytes,
        n_ctx=taken.get("n_ctx", planning.n_ctx),
        n_batch=taken.get("n_batch", planning.n_batch),
        n_ubatch=taken.get("n_ubatch", planning.n_ubatch),
    )


def _plan(path: str, planning: PlanOptions, plan_file: str | None) -> Planned:
    from nexus_ext.formats import open_model
    from nexus_ext.runtime import plan_model

    catalog = open_model(path)
    if catalog.container not in ("gguf", "nxf"):
        raise UsageError(
            f"{path} is {catalog.container}, which another program cannot open",
            hint="nexus convert can make a GGUF of it; nexus run and serve take it as it is",
        )
    request = planning.request(catalog)
    try:
        return plan_model(path, request, hardware=planning.hardware(path), plan=plan_file)
    except DoesNotFit as error:
        error.hint = f"{error.hint}; a smaller context (-c) of the program takes less".lstrip("; ")
        raise


def _judge(run: ForeignRun, command: tuple[str, ...], output: Output) -> int:
    report = run.report
    accounting = report.accounting
    if accounting is not None:
        passes = max(accounting.passes, 1)
        ready = accounting.pieces_ready / accounting.pieces if accounting.pieces else 1.0
        output.note(
            f"nexus: {accounting.passes} passes, {format_bytes(accounting.bytes_read)} read "
            f"({format_bytes(accounting.bytes_used / passes)} used per pass), "
            f"{ready:.0%} of slabs in time, {accounting.wait_ns / 1e9:.2f} s waited, "
            f"{accounting.compute_ns / 1e9:.2f} s computed"
        )
    elif not report.problem:
        output.note("nexus: the program ended without telling what was read")
    output.result({"command": command, "exit_status": run.exit_status, "report": report})
    if report.problem:
        ended = f" (it ended with status {run.exit_status})" if run.exit_status else ""
        kind = ReadFailed if report.failed else BackendUnavailable
        error = kind(f"{command[0]}: {report.problem}{ended}", hint=report.hint)
        if run.exit_status == 0:
            raise error
        output.error(error)
    return run.exit_status
