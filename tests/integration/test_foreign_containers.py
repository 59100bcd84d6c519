"""A container that a plugin reads: streamed from where it is, bit by bit as the GGUF of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import hookimpl
from nexus_ext.errors import FormatError, PluginError, UsageError, WriteFailed
from nexus_ext.formats import open_model
from nexus_ext.plugins import Plugins
from nexus_ext.testing import load_plugins
from tests.cli_support import call
from tests.hook_pages import blocks, page
from tests.integration.mux import a_prompt, answer, multiplexer, run
from tests.integration.streaming import logits, paged, prompt, stock
from tests.models_folder import find_model
from tests.unit.hook_exercises import write_folder

STORIES = find_model("stories260K-q4_0.gguf")
SMALL: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 32}


def example(hook: str) -> Any:
    """The plugin of a hook's page, as a module."""
    from types import ModuleType

    module = ModuleType(f"example_{hook}")
    sys.modules[module.__name__] = module  # where annotations are looked up
    exec(compile(blocks(page(hook))[1], hook, "exec"), module.__dict__)
    return module


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    def load(*plugins: Any) -> Plugins:
        found = load_plugins(*plugins)
        monkeypatch.setattr("nexus_ext.plugins._plugins", found)
        return found

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("foreign") / "stories"
    write_folder(STORIES, target)
    return target


@pytest.fixture
def reader(use: Callable[..., Plugins]) -> Plugins:
    return use(example("nexus_format_reader"))


@pytest.mark.parametrize("weights", ["300K", "100M"])
def test_it_computes_the_same_streamed_and_resident(
    weights: str, folder: Path, reader: Plugins
) -> None:
    with stock(STORIES, **SMALL) as llm:
        expected = logits(llm, prompt(20, llm.n_vocab()))
    with paged(folder, weights, **SMALL) as llm:
        assert llm.nexus.active
        assert llm.nexus.plan.everything_fits == (weights == "100M")
        assert np.array_equal(logits(llm, prompt(20, llm.n_vocab())), expected)


def test_the_multiplexer_takes_it(folder: Path, reader: Plugins) -> None:
    from nexus_ext.multiplexer.settings import ModelSpec

    async def test() -> None:
        paths = {"gguf": str(STORIES), "folder": str(folder)}
        async with multiplexer(find=lambda name: ModelSpec(name, paths[name])) as mux:
            question = a_prompt(3, 10)
            assert (await answer(mux, "folder", question))[:2] == (
                await answer(mux, "gguf", question)
            )[:2]

    run(test())


def test_every_command_takes_it(folder: Path, reader: Plugins, tmp_path: Path) -> None:
    shown = call("inspect", folder, "--json").json
    assert shown["container"] == "folder"
    assert call("plan", folder, "--weights", "300K").status == 0
    done = call("run", folder, "--weights", "300K", "-n", "5", "--temp", "0", "--quiet", "Once")
    same = call("run", STORIES, "--weights", "300K", "-n", "5", "--temp", "0", "--quiet", "Once")
    assert (done.status, done.out) == (0, same.out) and len(done.out) > 4
    refused = call("exec", "--model", folder, "--", "true")
    assert refused.status == 2 and "is folder, which another program cannot open" in refused.err


def test_it_becomes_an_nxf_and_a_gguf(folder: Path, reader: Plugins, tmp_path: Path) -> None:
    for name in ("model.gguf", "model.nxf"):
        done = call("convert", folder, tmp_path / name)
        assert done.status == 0, done.err
        made, stock_ = open_model(tmp_path / name), open_model(STORIES)
        assert [t.name for t in made.tensors] == [t.name for t in stock_.tensors]
        same = call("diff", tmp_path / name, STORIES) if name.endswith(".nxf") else None
        assert same is None or same.status in (0, 1)
    with stock(STORIES, **SMALL) as llm:
        expected = logits(llm, prompt(20, llm.n_vocab()))
    for name in ("model.gguf", "model.nxf"):
        with paged(tmp_path / name, "300K", **SMALL) as llm:
            assert np.array_equal(logits(llm, prompt(20, llm.n_vocab())), expected)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key": (lambda d: d.pop("tensors"), "model.json is broken"),
    "a type": (lambda d: d["tensors"][0].update(type="Q99"), "unknown type 'Q99'"),
    "a shape": (lambda d: d["tensors"][1].update(shape=[33, 1]), "do not fill blocks|33"),
    "beyond": (lambda d: d["tensors"][0].update(offset=1 << 40), "lies outside of its file"),
    "alignment": (lambda d: d["tensors"][0].update(offset=65), "not a multiple of 32"),
    "twice": (lambda d: d["tensors"].append(d["tensors"][0]), "used twice"),
    "metadata": (lambda d: d["metadata"].update(x=[1, "a"]), "an array mixes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_a_format_error_and_the_reader_stays(
    what: str, folder: Path, reader: Plugins, tmp_path: Path
) -> None:
    change, message = BROKEN[what]
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    change(described)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    (broken / "model.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        open_model(broken)
    (record,) = (r for r in reader.list_plugins() if not r.builtin)
    assert record.state == "active"
    assert open_model(folder).container == "folder"


class Reader:
    """A reader that does what it is told."""

    name = "told"

    def __init__(self, opens: Callable[[str], Any]) -> None:
        self._opens = opens

    @hookimpl
    def nexus_format_reader(self) -> Any:
        return self

    def claims(self, path: str, start: bytes) -> bool:
        return start.startswith(b"TOLD")

    def open(self, path: str) -> Any:
        return self._opens(path)


def lied(**changes: Any) -> Callable[[str], Any]:
    from dataclasses import replace

    def opens(path: str) -> Any:
        catalog = open_model(STORIES)
        first = replace(catalog.tensors[0], **changes.pop("first", {}))
        return replace(catalog, tensors=(first, *catalog.tensors[1:]), **changes)

    return opens


@pytest.mark.parametrize(
    ("opens", "why"),
    [
        (lambda path: None, "which is no Catalog"),
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lied(first={"name": "other"}), "not those of its header"),
        (lied(first={"nbytes": 1}), "not those of its header"),
        (lied(first={"file": 1}), "is in file 1 of 1"),
        (lied(first={"offset": -32}), "lies outside"),
        (lied(virtual_offsets=()), "its offsets or its shape"),
        (lied(header=b"GGUF"), "the embedded header has 4 bytes"),
        (lied(files=()), "is in file 0 of 0"),
    ],
)
def test_a_reader_that_lies_is_disabled_and_the_file_is_no_model(
    opens: Callable[[str], Any], why: str, use: Callable[..., Plugins], tmp_path: Path
) -> None:
    plugins = use(Reader(opens))
    file = tmp_path / "x.told"
    file.write_bytes(b"TOLD" + bytes(100))
    with pytest.raises(FormatError, match="the magic is b'TOLD'"):
        open_model(file)
    (record,) = (r for r in plugins.list_plugins() if not r.builtin)
    assert record.disabled == ("nexus_format_reader",)
    import re

    assert re.search(why, record.error), record.error


def test_a_writer_of_a_plugin_is_found_by_the_ending(
    use: Callable[..., Plugins], tmp_path: Path
) -> None:
    use(example("nexus_format_writer"))
    target = tmp_path / "model.weights"
    assert call("convert", STORIES, target, "--json").json["paths"] == [
        str(target),
        f"{target}.json",
    ]
    again = call("convert", STORIES, target)
    assert again.status == UsageError.exit_status and "exists" in again.err
    assert call("convert", STORIES, target, "--force").status == 0
    unknown = call("convert", STORIES, tmp_path / "model.other")
    assert unknown.status == 2 and "Name it one of .nxf, .gguf, .weights." in unknown.err


class Writer:
    name = "told"
    suffixes = (".told",)

    def __init__(self, writes: Callable[[], Any]) -> None:
        self._writes = writes

    @hookimpl
    def nexus_format_writer(self) -> Any:
        return self

    def write(self, source: Any, target: str, *, overwrite: bool, progress: Any) -> Any:
        return self._writes()


def full() -> None:
    raise WriteFailed("the disk is full", path="x", errno=28)


@pytest.mark.parametrize(
    ("writes", "message", "disabled"),
    [
        (lambda: ["/nowhere"], "could not write", True),
        (lambda: [], "could not write", True),
        (lambda: None, "could not write", True),
        (lambda: 1 / 0, "could not write", True),
        (full, "the disk is full", False),
    ],
)
def test_a_writer_that_fails_is_named(
    writes: Callable[[], Any],
    message: str,
    disabled: bool,
    use: Callable[..., Plugins],
    tmp_path: Path,
) -> None:
    plugins = use(Writer(writes))
    done = call("convert", STORIES, tmp_path / "model.told")
    assert done.status == PluginError.exit_status and message in done.err
    (record,) = (r for r in plugins.list_plugins() if not r.builtin)
    assert (record.state == "disabled") == disabled
    assert call("convert", STORIES, tmp_path / "model.nxf").status == 0
