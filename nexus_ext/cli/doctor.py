"""`nexus doctor`: look for everything that is known to go wrong."""

from __future__ import annotations

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import BackendUnavailable


@click.command()
@click.argument("model", type=MODEL, required=False)
@output_options
def doctor(model: str | None, output: Output) -> int:
    """Check that this installation can work, and with MODEL if one is given.

    Nothing is changed. Exit status 1 if a check fails; warnings cost speed or memory only.

    \b
    Examples:
      nexus doctor
      nexus doctor model.gguf --json
    """
    try:
        from nexus_ext.runtime.doctor import Subject, run_checks
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"nexus_ext or llama-cpp-python cannot be imported: {error}",
            hint="reinstall both: pip install --force-reinstall nexus_ext llama-cpp-python",
        ) from error
    checks = run_checks(Subject(model))
    bad = [check for check in checks if check.status == "fail"]
    output.result({"ok": not bad, "checks": checks})
    width = max(len(check.name) for check in checks)
    for check in checks:
        output.line(f"{check.status:<4}  {check.name:<{width}}  {check.sentence}")
        if check.fix and check.status != "ok":
            output.line(f"      {'':<{width}}  fix: {check.fix}")
    n_warn = sum(check.status == "warn" for check in checks)
    output.line(f"{len(checks)} checks, {n_warn} warnings, {len(bad)} failed")
    return 1 if bad else 0
