"""`nexus plugins`: which plugins were found, what they decide, and why one does not work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output

if TYPE_CHECKING:
    from nexus_ext.plugin_registry import PluginRecord


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
    deciders = {hook: record.name for record in records for hook in record.decides}
    rows = []
    for record in records:
        origin = f"{record.distribution} {record.version}".strip()
        first: tuple[str, str, str] = (record.name, record.state, origin)
        for hook in record.hooks or ("-",):
            rows.append((*first, hook, _use(record, hook, deciders)))
            first = ("", "", "")
    output.table(("plugin", "state", "from", "hook", "use"), rows)
    for record in records:
        if record.error:
            output.line(f"{record.name}: {record.error}")


def _use(record: PluginRecord, hook: str, deciders: Mapping[str, str]) -> str:
    if hook in record.disabled:
        return "disabled"
    if hook in record.overridden:
        return f"{deciders[hook]} decides"
    return "decides" if hook in record.decides else ""
