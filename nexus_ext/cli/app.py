"""The `nexus` command: which commands there are, and how an error ends one.

Commands are named here and imported when they are used, so that `nexus --help` loads none of them
and nothing that they need. The only place that turns errors into messages and exit statuses.

Exit status: 0 good, 1 failed or different, 2 wrong usage, 3 does not fit, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from nexus_ext._version import __version__
from nexus_ext.cli.output import Mode, Output, OutputLost, write
from nexus_ext.errors import Interrupted, NexusError, UsageError, WriteFailed

INTERRUPTED = Interrupted.exit_status
BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended

# name -> ("module:command", one line of help), in the order in which help lists them.
COMMANDS = {
    "run": ("nexus_ext.cli.run:run", "Run a model: one prompt, or a chat with -i."),
    "serve": ("nexus_ext.cli.serve:serve", "Serve models over HTTP: OpenAI, Ollama."),
    "pull": ("nexus_ext.cli.models:pull", "Download a model from Hugging Face."),
    "create": ("nexus_ext.cli.models:create", "Give a model a name."),
    "list": ("nexus_ext.cli.models:list_", "List models by name."),
    "show": ("nexus_ext.cli.models:show", "Show what a name means."),
    "cp": ("nexus_ext.cli.models:cp", "Give a model one more name."),
    "rm": ("nexus_ext.cli.models:rm", "Remove a name."),
    "ps": ("nexus_ext.cli.remote:ps", "List models that a server has loaded."),
    "stop": ("nexus_ext.cli.remote:stop", "Put a model out of a server's memory."),
    "demo": ("nexus_ext.cli.demo:demo", "Run a small model in less memory than its weights."),
    "plan": ("nexus_ext.cli.plan:plan", "Show where every byte would go, and the speed."),
    "inspect": ("nexus_ext.cli.inspect:inspect", "Show what is in a model file."),
    "convert": ("nexus_ext.cli.convert:convert", "Convert a model to another container."),
    "export": ("nexus_ext.cli.export:export", "Write tensors of a model as safetensors."),
    "optimize": ("nexus_ext.cli.optimize:optimize", "Lay out an NXF for its use."),
    "check": ("nexus_ext.cli.check:check", "Check every byte of an NXF."),
    "diff": ("nexus_ext.cli.check:diff", "Compare what two model files hold."),
    "probe": ("nexus_ext.cli.probe:probe", "Measure this machine: memory, GPUs, a disk."),
    "quantize": ("nexus_ext.cli.quantize:quantize", "Make a smaller model from an F16 one."),
    "quality": ("nexus_ext.cli.quality:quality", "Measure what a quantized model has lost."),
    "verify": ("nexus_ext.cli.verify:verify", "Compare streamed with resident, bit by bit."),
    "bench": ("nexus_ext.cli.bench:bench", "Measure a model against the physical bound."),
    "trace": ("nexus_ext.cli.trace:trace", "Record which experts a model uses."),
    "replay": ("nexus_ext.cli.replay:replay", "Replay such a trace through caches of experts."),
    "doctor": ("nexus_ext.cli.doctor:doctor", "Check that this installation can work."),
    "exec": ("nexus_ext.cli.exec:exec_", "Run another llama.cpp program with paged weights."),
    "plugins": ("nexus_ext.cli.plugins:plugins", "List plugins and what they decide."),
}


class LazyCommand(click.Command):
    """Stands for a built-in command until it is needed; a plugin cannot take its name."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._target = target

    def load(self) -> click.Command:
        module, _, attribute = self._target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


class NexusGroup(click.Group):
    """Built-in commands, imported when used, and those of plugins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked_plugins = False
        for name, (target, short_help) in COMMANDS.items():
            self.add_command(LazyCommand(name, target, short_help))

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask_plugins()
        added = sorted(name for name in self.commands if name not in COMMANDS)
        return [*COMMANDS, *added]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            self._ask_plugins()
        command = self.commands.get(cmd_name)
        return command.load() if isinstance(command, LazyCommand) else command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            raise UsageError(
                f"there is no command {args[0]!r}",
                hint=f"did you mean `nexus {close[0]}`?" if close else "see `nexus --help`",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not through get_command: that would import every command for a line of help.
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))
        for title, part in (
            ("Commands", [n for n in names if n in COMMANDS]),
            ("Commands of plugins", [n for n in names if n not in COMMANDS]),
        ):
            rows = [(name, self.commands[name].get_short_help_str(width)) for name in part]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and leave the process with its exit status."""
        _open_missing_streams()
        arguments = list(sys.argv[1:] if args is None else args)
        _complete_for_a_shell(self)
        sys.exit(self._run(arguments))

    def _run(self, arguments: list[str]) -> int:
        output = _output_for_errors(arguments)
        try:
            with _logging(output):
                status = self._reported(arguments, output)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # also one that writing an error met
            _drop_stdout()
            return BROKEN_PIPE
        except OutputLost as lost:
            _drop_stdout()
            with suppress(OutputLost, BrokenPipeError):
                write(sys.stderr, f"error: {lost}\n")
            return WriteFailed.exit_status

    def _reported(self, arguments: list[str], output: Output) -> int:
        try:
            return self._invoke(arguments)
        except NexusError as error:
            _show_traceback(output)
            output.error(error)
            return error.exit_status
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return UsageError.exit_status
        except click.ClickException as error:
            usage = UsageError(_sentence(error), hint=_hint(error))
            output.error(usage)
            return usage.exit_status if isinstance(error, click.UsageError) else 1
        except (KeyboardInterrupt, click.Abort):
            output.error(Interrupted("interrupted"))
            return INTERRUPTED
        except (BrokenPipeError, OutputLost):
            raise
        except Exception as error:
            _show_traceback(output)
            text = f"unexpected {type(error).__name__}: {error}"
            output.error(NexusError(text, hint="this is a bug: report it with what --debug shows"))
            return NexusError.exit_status

    def _invoke(self, arguments: list[str]) -> int:
        try:
            with self.make_context("nexus", arguments) as context:
                status = self.invoke(context)
        except click.exceptions.Exit as end:  # --help and --version end like this
            return end.exit_code
        return status if isinstance(status, int) else 0

    def _ask_plugins(self) -> None:
        if not self._asked_plugins:
            self._asked_plugins = True
            from nexus_ext.plugins import plugins

            plugins().register_commands(self)


def _open_missing_streams() -> None:
    """Give stdin, stdout and stderr a place if this process was started without them.

    Else the next files that are opened, a model among them, would be what libraries print to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest that is free, so it gets this number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def _complete_for_a_shell(command: click.Command) -> None:
    instruction = os.environ.get("_NEXUS_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(command, {}, "nexus", "_NEXUS_COMPLETE", instruction))


def _output_for_errors(arguments: Sequence[str]) -> Output:
    """Return the output that the arguments ask for, also when they cannot be parsed."""
    given = arguments[: arguments.index("--")] if "--" in arguments else arguments
    quiet = "--quiet" in given or "-q" in given
    mode: Mode = "json" if "--json" in given else "quiet" if quiet else "human"
    return Output(mode, debug="--debug" in given)


def _sentence(error: click.ClickException) -> str:
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path} --help`" if isinstance(context, click.Context) else ""


@contextmanager
def _logging(output: Output) -> Iterator[None]:
    """Let what libraries log go to stderr: warnings, or everything with --debug."""
    logger = logging.getLogger("nexus_ext")
    # It says that it measures, which takes seconds in which nothing else is said.
    measuring = logging.getLogger("nexus_ext.hardware")
    before = (logger.level, measuring.level)
    if output.debug:
        logger.setLevel(logging.DEBUG)
    else:
        logger.setLevel(logging.ERROR if output.mode == "quiet" else logging.WARNING)
        measuring.setLevel(logging.INFO if output.mode == "human" else logging.NOTSET)
    handler = logging.StreamHandler()
    # What NEXUS_TRACE_PLUGINS logs has a handler of its own.
    handler.setLevel(logging.DEBUG if output.debug else logging.INFO)
    handler.setFormatter(_Formatter())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        measuring.setLevel(before[1])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        named = record.levelno != logging.INFO
        return f"{record.levelname.lower()}: {text}" if named else text


def _show_traceback(output: Output) -> None:
    if output.debug:
        import traceback

        traceback.print_exc()


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or Python complains about the pipe when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # stdout is no file: nothing is flushed to it at the end


@click.group(
    cls=NexusGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="MODEL is a file, or a name of `nexus list`. Sizes are written 4G, 512M or 1.5GiB and "
    "are binary. Every command takes --help, --json, --quiet and --debug.",
)
@click.version_option(__version__, prog_name="nexus")
def cli() -> None:
    """Run models that are larger than your memory, with llama.cpp, from NVMe.

    \b
    Examples:
      nexus demo
      nexus plan model.gguf --ram 4G
      nexus run model.gguf --ram 4G "Once upon a time"
      nexus run model.gguf --ram 4G -i
    """
