"""`nexus plugins`: which plugins were found, what they decide, and why one does not work."""

from __future__ import annotations

import click

from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output


@click.command()
@output_options
def plugins(output: Output) -> None:
    """List plugins: what each implements, what it decides, and why it failed if it did.

    "active": it is used. "overridden": all that it answers, another plugin answers before it.
    "disabled": it raised, or answered what is not allowed, and is not asked again. "failed": it
    cannot be imported or registered. "skipped": left out, or written for a newer nexus_ext.

    Plugins are found by their entry point. NEXUS_LOAD_PLUGINS names the only ones to load ("none"
    for none), NEXUS_TRACE_PLUGINS=1 logs every call.

    \b
    Examples:
      nexus plugins
      NEXUS_LOAD_PLUGINS=none nexus plugins --json
    """
    from nexus_ext.hookspecs import PLUGIN_API
    from nexus_ext.plugins import list_plugins

    records = list_plugins()
    output.result({"api": PLUGIN_API, "plugins": records})
    output.table(
        ("plugin", "state", "from", "api", "decides", "hooks"),
        [
            (
                record.name,
                record.state,
                f"{record.distribution} {record.version}".strip() or "-",
                str(record.api),
                " ".join(record.decides) or "-",
                " ".join(record.hooks) or "-",
            )
            for record in records
        ],
    )
    for record in records:
        for hook in record.overridden:
            if not record.builtin:
                winner = next(r.name for r in records if hook in r.decides)
                output.line(f"{record.name}: {hook} is answered by {winner}")
        if record.disabled:
            output.line(f"{record.name}: disabled for {' '.join(record.disabled)}")
        if record.error:
            output.line(f"{record.name}: {record.error}")
