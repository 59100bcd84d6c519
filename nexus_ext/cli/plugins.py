"""`nexus plugins`: which plugins were found, what they decide, and why one does not work."""

from __future__ import annotations

import click

from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output


@click.command()
@output_options
def plugins(output: Output) -> None:
    """List plugins: what each implements, what it decides, and why it failed if it did.

    Plugins are found by their entry point. NEXUS_LOAD_PLUGINS names the only ones to load ("none"
    for none), NEXUS_TRACE_PLUGINS=1 logs every call.

    \b
    Examples:
      nexus plugins
      NEXUS_LOAD_PLUGINS=none nexus plugins --json
    """
    from nexus_ext.plugins import list_plugins

    records = list_plugins()
    output.result({"plugins": records})
    output.table(
        ("plugin", "state", "from", "decides", "hooks"),
        [
            (
                record.name,
                record.state,
                f"{record.distribution} {record.version}".strip() or "-",
                " ".join(record.decides) or "-",
                " ".join(record.hooks) or "-",
            )
            for record in records
        ],
    )
    for record in records:
        if record.error:
            output.line(f"{record.name}: {record.error}")
