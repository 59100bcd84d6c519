"""`nexus list`, `show`, `create`, `cp`, `rm` and `pull`: models by name."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from nexus_ext.cli.library import StoreOptions, store_options
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output
from nexus_ext.cli.sampling import read
from nexus_ext.errors import UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.store import StoredModel


@click.command("list")
@store_options
@output_options
def list_(stores: StoreOptions, output: Output) -> None:
    """List models: ours, and those of Ollama and LM Studio, which are read where they are.

    \b
    Examples:
      nexus list
      nexus list --json
    """
    models = stores.open().models()
    output.result({"models": [fields(model) for model in models]})
    output.table(
        ("NAME", "ID", ">SIZE", "MODIFIED", "FROM"),
        [
            (
                str(model.name),
                model.digest[:12],
                format_bytes(model.nbytes),
                ago(time.time() - model.modified_s),
                model.origin,
            )
            for model in models
        ],
    )
    if not models:
        output.note("There is none yet: `nexus pull` or `nexus create` makes one.")


@click.command()
@click.argument("name")
@store_options
@output_options
def show(name: str, stores: StoreOptions, output: Output) -> None:
    """Show what a name means: the file, its parameters, where its template comes from.

    \b
    Examples:
      nexus show qwen3:8b
      nexus show qwen3:8b --json
    """
    from nexus_ext.formats import open_model

    model = stores.open().find(name)
    catalog = open_model(model.path)
    in_file = "tokenizer.chat_template" in catalog.metadata
    template = "its own" if model.template else "the file's" if in_file else "none"
    output.result(
        {
            **fields(model),
            "system": model.system,
            "template": model.template,
            "template_in_file": in_file,
            "parameters": dict(model.parameters),
            "license": model.license,
            "notes": list(model.notes),
            "architecture": catalog.shape.architecture,
            "n_ctx_train": catalog.shape.n_ctx_train,
            "n_layers": catalog.shape.n_layers,
        }
    )
    output.facts(
        [
            ("name", str(model.name)),
            ("from", f"{model.origin}, {model.source}"),
            ("file", model.path),
            ("size", format_bytes(model.nbytes)),
            ("architecture", catalog.shape.architecture),
            ("context", f"{catalog.shape.n_ctx_train} tokens"),
            ("chat template", template),
            *([("system", model.system)] if model.system else []),
            *((name, str(value)) for name, value in model.parameters.items()),
            *(("note", note) for note in model.notes),
        ]
    )


@click.command()
@click.argument("name")
@click.argument("source", nargs=-1, required=True, metavar="[FROM] SOURCE")
@click.option("--template", "template_file", metavar="FILE", help="A Jinja chat template.")
@click.option("--system", metavar="TEXT", help="What the model is told when nobody says anything.")
@click.option(
    "-p",
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter under Ollama's name (temperature, top_k, num_ctx, stop). Can be repeated.",
)
@click.option("--copy", is_flag=True, help="Copy the file into the store instead of naming it.")
@store_options
@output_options
def create(
    name: str,
    source: tuple[str, ...],
    template_file: str | None,
    system: str | None,
    parameters: tuple[str, ...],
    copy: bool,
    stores: StoreOptions,
    output: Output,
) -> None:
    """Give the model in a file, or one that has a name, the name NAME.

    The file is read where it lies; --copy takes it into the store.

    \b
    Examples:
      nexus create mine FROM model.gguf
      nexus create mine:brief model.gguf --system "You are brief." -p temperature=0.2
      nexus create mine FROM qwen3:8b --template chat.jinja -p stop=END -p stop=STOP
    """
    from nexus_ext.cli.library import model_at
    from nexus_ext.store import ModelName

    words = source[1:] if len(source) == 2 and source[0].upper() == "FROM" else source
    if len(words) != 1:
        raise UsageError(
            f"create takes a name and one source, not {' '.join(source)!r}",
            hint="nexus create NAME FROM FILE",
        )
    target = ModelName.parse(name)
    library = stores.open()
    base = model_at(words[0], stores)
    given = _parameters(parameters)
    made = library.own.create(
        target,
        base.path if base is not None else words[0],
        template=read(template_file) if template_file else base.template if base else None,
        system=system if system is not None else base.system if base else None,
        parameters={**(base.parameters if base else {}), **given},
        license=base.license if base else "",
        source=(base.source or str(base.name)) if base else "",
        copy=copy,
    )
    output.result(fields(made))
    output.line(f"{made.name} is {made.path}")


def _parameters(given: tuple[str, ...]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign:
            raise UsageError(f"--param is {each!r}, no name with a value", hint="-p top_k=20")
        if name == "stop":
            made.setdefault("stop", []).append(value)
        else:
            made[name] = value
    from nexus_ext.store.parameters import KNOWN

    unknown = [name for name in made if name not in KNOWN]
    if unknown:
        raise UsageError(
            f"there is no parameter {unknown[0]!r}", hint=f"known are {', '.join(KNOWN)}"
        )
    return made


@click.command()
@click.argument("source")
@click.argument("target")
@store_options
@output_options
def cp(source: str, target: str, stores: StoreOptions, output: Output) -> None:
    """Give a model one more name. No weights are copied.

    \b
    Examples:
      nexus cp qwen3:8b mine
    """
    from nexus_ext.store import ModelName

    library = stores.open()
    made = library.own.copy(library.find(source), ModelName.parse(target))
    output.result(fields(made))
    output.line(f"{made.name} is {made.path}")


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@store_options
@output_options
def rm(names: tuple[str, ...], stores: StoreOptions, output: Output) -> None:
    """Remove names from our own store, and files that it owns when no name is left.

    Files that lie elsewhere, and the stores of Ollama and LM Studio, are never changed.

    \b
    Examples:
      nexus rm mine
      nexus rm mine other:v2
    """
    from nexus_ext.store import ModelName

    library = stores.open()
    removed = []
    for name in names:
        parsed = ModelName.parse(name)
        freed = library.own.remove(parsed)
        removed.append({"name": str(parsed), "freed_bytes": freed})
        output.line(f"removed {parsed}" + (f", {format_bytes(freed)} freed" if freed else ""))
    output.result({"removed": removed})


@click.command()
@click.argument("name", metavar="USER/REPOSITORY[:QUANTIZATION]")
@click.option("--as", "target", metavar="NAME", help="The name in our store.")
@click.option("--revision", default="main", metavar="REV", help="Branch, tag or commit.")
@store_options
@output_options
def pull(
    name: str, target: str | None, revision: str, stores: StoreOptions, output: Output
) -> None:
    """Download a GGUF model from Hugging Face.

    A download that was interrupted goes on where it stopped. Every file is compared with the
    sha256 that was announced. HF_TOKEN is sent to HF_ENDPOINT (huggingface.co) and nowhere else.

    \b
    Examples:
      nexus pull bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M
      nexus pull hf.co/ggml-org/models:stories260K --as stories
    """
    from nexus_ext.store import ModelName
    from nexus_ext.store.pull import Progress
    from nexus_ext.store.pull import pull as download

    live = Live(output)
    begin = time.monotonic()
    first: int | None = None

    def report(progress: Progress) -> bool:
        nonlocal first
        done, total = progress.done_bytes, progress.total_bytes
        first = done if first is None else first
        elapsed = time.monotonic() - begin
        speed = f", {format_bytes((done - first) / elapsed)}/s" if elapsed > 1 else ""
        live.status(f"{progress.status}: {format_bytes(done)} of {format_bytes(total)}{speed}")
        return False

    live.status("asking what there is")
    parsed = ModelName.parse(target) if target else None
    try:
        made = download(name, stores.open().own, target=parsed, revision=revision, report=report)
    finally:
        live.clear()
    output.result(fields(made))
    output.line(f"{made.name} is {made.path}")


def fields(model: StoredModel) -> dict[str, object]:
    """Return what JSON output says of a model."""
    return {
        "name": str(model.name),
        "path": model.path,
        "bytes": model.nbytes,
        "modified_s": model.modified_s,
        "digest": model.digest,
        "from": model.origin,
        "source": model.source,
    }


def ago(seconds: float) -> str:
    """Return a span of time in its largest unit."""
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            n = int(seconds // size)
            return f"{n} {name}{'s' if n > 1 else ''} ago"
    return "just now"
