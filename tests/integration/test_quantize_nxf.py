"""`nexus quantize` into an NXF: what belongs to a model is in its file, and used from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats import open_gguf, open_model
from nexus_ext.formats.nxf_convert import to_gguf
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.formats.residuals import has_residuals, read_residual, read_residuals
from nexus_ext.formats.sections import read_section
from nexus_ext.formats.sources import NxfSource
from nexus_ext.runtime.imatrix import load_imatrix
from nexus_ext.runtime.quantize_nxf import place_for_gguf
from nexus_ext.runtime.residual import identity
from nexus_ext.runtime.weights import Weights
from tests.cli_support import call
from tests.integration.streaming import logits, prompt
from tests.models_folder import find_model
from tests.stories import STORIES

SMALL: dict[str, Any] = {
    "n_ctx": 64, "n_threads": 2, "n_gpu_layers": 0, "verbose": False, "logits_all": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NXF with all sections, and the GGUF with a sidecar that the same command makes."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_bytes(STORIES)
    source = find_model("stories260K-f32.gguf")
    for name in ("rough.nxf", "rough.gguf"):
        done = call(
            *("quantize", source, "-o", folder / name, "--base", "q4_0", "--residual", "--json"),
            *("--calibrate", folder / "text.txt", "--windows", "2", "--ctx", "64"),
        )
        assert done.status == 0, done.err
        assert done.json["residual"]["path"].startswith(str(folder / name))
        assert done.json["nbytes"] == (folder / name).stat().st_size
    return folder


def test_nothing_but_the_nxf_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"text.txt", "rough.nxf", "rough.gguf", "rough.gguf.nxr"}


def test_the_nxf_holds_the_same_model_and_the_same_residuals(folder: Path, tmp_path: Path) -> None:
    source = NxfSource(str(folder / "rough.nxf"))
    to_gguf(source, tmp_path / "back.gguf")
    source.close()
    assert (tmp_path / "back.gguf").read_bytes() == (folder / "rough.gguf").read_bytes()
    sidecar = read_residuals(folder / "rough.gguf.nxr")
    inside = read_residuals(folder / "rough.nxf")
    assert inside.tensors == sidecar.tensors and inside.fingerprint == sidecar.fingerprint
    for stored in inside.tensors:
        assert read_residual(inside, stored) == read_residual(sidecar, stored)
    assert has_residuals(folder / "rough.nxf") and not has_residuals(folder / "rough.gguf")
    catalogs = (open_gguf(folder / "rough.gguf"), open_model(folder / "rough.nxf"))
    assert len({identity(Weights(catalog)) for catalog in catalogs}) == 1


def corrected(model: Path, residual: Any) -> Any:
    llm = Llama(model, residual=residual, residual_share=0.25, **SMALL)
    try:
        assert (llm.nexus.residuals is not None) == bool(residual)
        return logits(llm, prompt(6, llm.n_vocab()))
    finally:
        llm.close()


def test_its_own_residuals_are_used_when_asked_for(folder: Path) -> None:
    sidecar = corrected(folder / "rough.gguf", folder / "rough.gguf.nxr")
    plain = corrected(folder / "rough.nxf", None)  # lossless unless asked for: the bits of the GGUF
    assert np.array_equal(plain, corrected(folder / "rough.gguf", False))
    assert not np.array_equal(plain, sidecar)
    for residual in (True, folder / "rough.nxf", folder / "rough.gguf.nxr"):
        assert np.array_equal(corrected(folder / "rough.nxf", residual), sidecar), residual


def test_a_model_that_holds_them_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nexus_ext.runtime")
    for residual, said in ((None, True), (False, False), (True, False)):
        caplog.clear()
        corrected(folder / "rough.nxf", residual)
        assert ("rough.nxf holds residuals" in caplog.text) == said, residual


def test_run_takes_them_from_the_file(folder: Path) -> None:
    nxf = folder / "rough.nxf"
    options = ("--ctx", "64", "-n", "4", "--json", "--residual", nxf, "--residual-share", "0.1")
    done = call("run", nxf, "Once", *options)
    assert done.status == 0, done.err
    assert done.json["text"]


def test_a_model_without_residuals_says_so(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.nxf"
    done = call("convert", folder / "rough.nxf", bare, "--without-section", "residuals")
    assert done.status == 0, done.err
    with pytest.raises(UsageError, match="has no section 'residuals'"):
        read_residuals(bare)
    assert read_section(bare, "residuals") is None
    assert read_section(folder / "rough.gguf", "residuals") is None


def test_a_flipped_bit_in_a_residual_is_found(folder: Path, tmp_path: Path) -> None:
    nxf = tmp_path / "m.nxf"
    data = bytearray((folder / "rough.nxf").read_bytes())
    with NxfReader(folder / "rough.nxf") as reader:
        section = next(s for s in reader.file.nxf.sections if s.name == "residuals")
        data[int(reader.file.table["offset"][section.first_chunk]) + 5000] ^= 1
    nxf.write_bytes(data)
    with pytest.raises(FormatError, match="residuals"):
        read_residuals(nxf)


def test_the_importance_is_a_section_that_a_quantization_takes(
    folder: Path, tmp_path: Path
) -> None:
    found = load_imatrix(str(folder / "rough.nxf"))
    assert found.n_tokens > 0 and found.entries
    source, again = find_model("stories260K-f32.gguf"), tmp_path / "again.gguf"
    base = ("quantize", source, "-o", again, "--base", "q4_0")
    done = call(*base, "--imatrix", folder / "rough.nxf")
    assert done.status == 0, done.err
    assert again.read_bytes() == (folder / "rough.gguf").read_bytes()


def test_a_plan_is_a_section_that_is_obeyed(folder: Path, tmp_path: Path) -> None:
    plan, nxf = tmp_path / "plan.json", tmp_path / "planned.nxf"
    made = call("plan", folder / "rough.nxf", "--weights", "300K", "--ctx", "64", "-o", plan)
    assert made.status == 0, made.err
    done = call("convert", folder / "rough.nxf", nxf, "--section", f"plan={plan}")
    assert done.status == 0, done.err
    llm = Llama(nxf, plan=nxf, **SMALL)
    try:
        assert llm.nexus.plan.to_json() == plan.read_text()
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rough.nxf", "x.nxf", "--section", "plan"), "not a name, '=' and a file"),
        (("rough.nxf", "x.gguf", "--section", "plan=a"), "into an NXF"),
        (("rough.nxf", "x.nxf", "--section", "odd=text.txt"), "cannot be the name of a section"),
        (("rough.nxf", "x.nxf", "--without-section", "draft"), "has no section 'draft'"),
    ],
)
def test_sections_that_cannot_be_are_refused(
    arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    source, target, option, value = arguments
    value = value.replace("text.txt", str(folder / "text.txt"))
    done = call("convert", folder / source, tmp_path / target, option, value)
    assert done.status == 2 and message in done.err
    assert not list(tmp_path.iterdir())


def test_what_a_kill_has_left_is_taken_away(tmp_path: Path) -> None:
    target = tmp_path / "m.nxf"
    left = tmp_path / ".m.nxf.quantize"
    left.mkdir()
    for name in ("m.gguf", "m.gguf.part", "m.gguf.nxr"):
        (left / name).write_bytes(b"half")
    with place_for_gguf(str(target)) as path:
        assert path == str(left / "m.gguf") and not list(left.iterdir())
        with (
            pytest.raises(UsageError, match="another process is writing it"),
            place_for_gguf(str(target)),
        ):
            raise AssertionError("two at once")
        assert left.exists()
    assert not list(tmp_path.iterdir())


def test_a_target_that_may_not_be_written_is_refused_first(folder: Path, tmp_path: Path) -> None:
    source = find_model("stories260K-f32.gguf")
    done = call("quantize", source, "-o", folder / "rough.nxf", "--base", "q4_0")
    assert done.status == 2 and "exists already" in done.err
    done = call("quantize", source, "-o", tmp_path / "no" / "m.nxf", "--base", "q4_0")
    assert done.status == 2 and "does not exist" in done.err
