"""`nexus convert`: from one container of weights to another, by the kinds of both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.live import Live
from nexus_ext.cli.options import SIZE, output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import NexusError, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.formats.nxf_convert import Report, TensorReport


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line says about the result."""

    codec: str
    rules: tuple[tuple[str, str], ...]
    shard_nbytes: int | None
    sha256: bool
    n_threads: int | None
    overwrite: bool
    sections: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()


class Meter:
    """Shows how far a conversion is, its rate and the time that is left."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._start_s = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done  # of an attempt before: it took no time now
        seconds = max(time.monotonic() - self._start_s, 1e-3)
        rate = (done - self._first) / seconds
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        self._live.status(
            f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s{left}"
        )


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--codec", default="raw", show_default=True, help="How weights are stored in an NXF.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="REGEX=CODEC",
    help="The codec of tensors whose name the expression is found in. Can be repeated; the first "
    "match wins.",
)
@click.option("--shard-size", "shard_nbytes", type=SIZE, metavar="SIZE", help="Size of NXF shards.")
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="NAME=FILE",
    help="Put FILE into the NXF as its section NAME, for instance plan=plan.json. Can be repeated.",
)
@click.option(
    "--without-section", "without", multiple=True, metavar="NAME", help="Leave a section out."
)
@click.option("--no-sha256", is_flag=True, help="Do not record the SHA-256 of the GGUF files.")
@click.option(
    "--type",
    "type_name",
    metavar="TYPE",
    help="Type of the weights of a folder: auto, f32, f16, bf16, q8_0, q4_k_m, tq2_0, ...  "
    "[default: auto, as they are stored]",
)
@click.option("--pre", metavar="NAME", help="llama.cpp's pre-tokenizer, if the folder is silent.")
@click.option("--name", metavar="NAME", help="Name of the model.  [default: that of the folder]")
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that encode or quantize.",
)
@click.option("--force", "overwrite", is_flag=True, help="Overwrite what is at TARGET.")
@click.option("--tensors", is_flag=True, help="Report every tensor.")
@output_options
def convert(
    source: str,
    target: str,
    codec: str,
    rules: tuple[str, ...],
    shard_nbytes: int | None,
    sections: tuple[str, ...],
    without: tuple[str, ...],
    no_sha256: bool,
    type_name: str | None,
    pre: str | None,
    name: str | None,
    n_threads: int | None,
    overwrite: bool,
    tensors: bool,
    output: Output,
) -> None:
    """Convert the model SOURCE into TARGET, whose ending (.nxf or .gguf) says what it becomes.

    GGUF to NXF and back gives the same files, byte for byte. Of a split GGUF, name any part. A
    conversion to NXF that was stopped goes on where it was when it is started again.

    A folder of the Hugging Face hub (config.json, safetensors, tokenizer) becomes either. Weights
    keep the type in which they are stored, unless --type names another; llama.cpp quantizes.

    \b
    Examples:
      nexus convert Qwen3-8B/ qwen3-8b.gguf --type q4_k_m
      nexus convert model.gguf model.nxf
      nexus convert model.gguf model.nxf --codec ans --rule "token_embd=raw"
      nexus convert model.nxf model.gguf
      nexus convert model.gguf model.nxf --section plan=plan.json --section residuals=model.gguf.nxr
    """
    wishes = Wishes(
        codec=codec,
        rules=tuple(parse_rule(rule) for rule in rules),
        shard_nbytes=shard_nbytes,
        sha256=not no_sha256,
        n_threads=n_threads,
        overwrite=overwrite,
        sections=tuple(parse_section(section) for section in sections),
        without=without,
    )
    source_kind = kind_of_source(source)
    live = Live(output)
    start_s = time.monotonic()
    if source_kind != "folder" and not is_ours(target) and not (sections or without):
        from nexus_ext.cli.convert_other import to_other

        written = to_other(source, target, wishes, Meter(live))
        if written is not None:
            live.clear()
            show(output, written, time.monotonic() - start_s, tensors=tensors)
            return
    kinds = (source_kind, kind_of_target(target))
    if (sections or without) and (kinds[0] == "folder" or kinds[1] != "nxf"):
        raise UsageError(
            f"{source} ({kinds[0]}) to {target} ({kinds[1]}): sections go from a GGUF or an NXF "
            "into an NXF",
            hint="convert to an NXF first",
        )
    if kinds[0] == "folder":
        from nexus_ext.cli.convert_folder import convert_folder

        convert_folder(source, target, type_name, pre, name, wishes, output, tensors=tensors)
        return
    for option, given in (("--type", type_name), ("--pre", pre), ("--name", name)):
        if given is not None:
            raise UsageError(f"{option} is for folders of the hub, {source} is a {kinds[0]} file")
    converter = CONVERTERS.get(kinds)
    if converter is None:
        known = ", ".join(f"{a} to {b}" for a, b in (*CONVERTERS, ("folder", "gguf or nxf")))
        raise UsageError(
            f"there is no conversion of {source} ({kinds[0]}) to {target} ({kinds[1]})",
            hint=f"There are: {known}.",
        )
    report = converter(source, target, wishes, Meter(live))
    live.clear()
    show(output, report, time.monotonic() - start_s, tensors=tensors)


def kind_of_source(path: str) -> str:
    """Return "nxf" or "gguf" by how the file starts, "folder" for a directory of the hub.

    "other" is what a plugin reads.
    """
    from nexus_ext.formats import is_other, open_model
    from nexus_ext.formats.nxf_file import is_nxf

    if os.path.isfile(os.path.join(path, "config.json")):
        return "folder"
    if is_other(path):
        try:
            return "gguf" if open_model(path).container == "gguf" else "other"
        except NexusError:  # nobody reads it: what it is taken for says why
            pass
    if os.path.isdir(path):
        return "folder"
    return "nxf" if is_nxf(path) else "gguf"


def is_ours(target: str) -> bool:
    """Tell whether the ending of `target` is one of ours, or it is a directory."""
    return os.path.isdir(target) or target.lower().endswith((".gguf", ".nxf"))


def kind_of_target(path: str) -> str:
    """Return what `path` becomes: by its ending; a directory gets GGUF files."""
    kind = os.path.splitext(path)[1].removeprefix(".").lower()
    if kind in ("gguf", "nxf"):
        return kind
    if os.path.isdir(path):
        return "gguf"
    from nexus_ext.plugins.containers import suffixes

    known = ", ".join((".nxf", ".gguf", *suffixes()))
    raise UsageError(
        f"{path}: the ending does not say what it shall become", hint=f"Name it one of {known}."
    )


def parse_rule(text: str) -> tuple[str, str]:
    """Return (regular expression, codec)."""
    pattern, _, codec = text.rpartition("=")
    if not pattern or not codec:
        raise UsageError(
            f"--rule is {text!r}, which is not an expression, '=' and a codec",
            hint='Write for instance --rule "ffn_down=ans".',
        )
    return pattern, codec


def parse_section(text: str) -> tuple[str, str]:
    """Return (name, path)."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise UsageError(
            f"--section is {text!r}, which is not a name, '=' and a file",
            hint="Write for instance --section plan=plan.json.",
        )
    return name, path


def to_nxf(source: str, target: str, wishes: Wishes, meter: Meter) -> Report:
    """Convert a GGUF, or an NXF to be laid out anew, as `wishes` say."""
    from nexus_ext.formats import nxf_convert
    from nexus_ext.formats.nxf_layout import Rules
    from nexus_ext.formats.sections import WithSections
    from nexus_ext.formats.sources import Source, open_source
    from nexus_ext.plugins import plugins

    codecs = plugins().codecs()
    opened: Source = open_source(source, codecs)
    if wishes.sections or wishes.without:
        opened = WithSections(opened, dict(wishes.sections), without=wishes.without)
    try:
        return nxf_convert.to_nxf(
            opened,
            target,
            rules=Rules(wishes.codec, wishes.rules),
            overwrite=wishes.overwrite,
            shard_nbytes=wishes.shard_nbytes,
            n_threads=wishes.n_threads,
            sha256=wishes.sha256,
            codecs=codecs,
            progress=meter,
        )
    finally:
        opened.close()


def _to_gguf(source: str, target: str, wishes: Wishes, meter: Meter) -> Report:
    from nexus_ext.formats.nxf_convert import to_gguf
    from nexus_ext.formats.sources import NxfSource
    from nexus_ext.plugins import plugins

    opened = NxfSource(source, plugins().codecs())
    try:
        return to_gguf(opened, target, overwrite=wishes.overwrite, progress=meter)
    finally:
        opened.close()


def _other_to_gguf(source: str, target: str, wishes: Wishes, meter: Meter) -> Report:
    from nexus_ext.cli.convert_other import other_to_gguf

    return other_to_gguf(source, target, wishes, meter)


Converter = Callable[[str, str, Wishes, Meter], "Report"]
CONVERTERS: dict[tuple[str, str], Converter] = {
    ("gguf", "nxf"): to_nxf,
    ("nxf", "nxf"): to_nxf,
    ("nxf", "gguf"): _to_gguf,
    ("other", "nxf"): to_nxf,
    ("other", "gguf"): _other_to_gguf,
}


def show(output: Output, report: Report, seconds: float, *, tensors: bool) -> None:
    """Report a conversion: by type, or every tensor."""
    rate = (report.nbytes - report.resumed_nbytes) / max(seconds, 1e-3)
    output.result({"seconds": seconds, **_fields(report, tensors=tensors)})
    if report.resumed_nbytes:
        output.note(f"{format_bytes(report.resumed_nbytes)} were there from an attempt before")
    if report.tensors:
        columns = ("what", ">tensors", ">bytes", ">stored", ">ratio", ">chunks", ">raw")
        output.table(columns, _rows(report.tensors, each=tensors), total=True)
    output.line(
        f"{format_bytes(report.file_nbytes)} in {len(report.paths)} "
        f"file{'s' if len(report.paths) > 1 else ''}, {seconds:.1f} s, {format_bytes(rate)}/s"
    )
    for path, digest in zip(report.paths, report.sha256, strict=False):
        if path.endswith(".gguf") and digest:
            output.line(f"sha256 {digest}  {path}")


def _rows(tensors: tuple[TensorReport, ...], *, each: bool) -> list[tuple[str, ...]]:
    """One row a tensor, or one for each type and codec; the last is the sum."""
    groups: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        kind = f"{tensor.type_name or 'other bytes'}, {tensor.codec}"
        groups.setdefault(f"{tensor.name} ({kind})" if each else kind, []).append(tensor)
    groups["all"] = list(tensors)
    rows: list[tuple[str, ...]] = []
    for name, members in groups.items():
        nbytes = sum(t.nbytes for t in members)
        stored = sum(t.stored_nbytes for t in members)
        rows.append(
            (
                name,
                str(len(members)),
                format_bytes(nbytes),
                format_bytes(stored),
                f"{stored / max(nbytes, 1):.3f}",
                str(sum(t.n_chunks for t in members)),
                str(sum(t.n_raw for t in members)),
            )
        )
    return rows


def _fields(report: Report, *, tensors: bool) -> dict[str, object]:
    return {
        "paths": report.paths,
        "weights_bytes": report.nbytes,
        "file_bytes": report.file_nbytes,
        "stored_bytes": sum(t.stored_nbytes for t in report.tensors),
        "resumed_bytes": report.resumed_nbytes,
        "sha256": report.sha256,
        **({"tensors": report.tensors} if tensors else {}),
    }
