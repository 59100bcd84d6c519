"""Sections go into an NXF, are read, kept, replaced and taken out; the model stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.formats.diff import diff
from nexus_ext.formats.nxf_convert import to_gguf, to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.formats.nxf_verify import check_file
from nexus_ext.formats.sections import WithSections
from nexus_ext.formats.sources import NxfSource, open_source
from nexus_ext.testing.synthetic import MoeDims, write_moe


def write(model: Path, target: Path, files: dict[str, bytes], *without: str) -> None:
    paths = {}
    for name, contents in files.items():
        paths[name] = str(target.with_suffix(f".{name}"))
        Path(paths[name]).write_bytes(contents)
    source = WithSections(open_source(model), paths, without=without)
    try:
        to_nxf(source, target, rules=Rules("ans"))
    finally:
        source.close()


def sections(path: Path) -> dict[str, bytes]:
    with NxfReader(path) as reader:
        return {s.name: reader.section(s.name) for s in reader.file.nxf.sections}


def test_sections_come_and_go_and_the_model_stays(tmp_path: Path) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=MoeDims(n_layers=1))
    gguf.write_bytes(gguf.read_bytes() + b"a rest")
    popularity, own = bytes(range(256)) * 9000, b"\x01"
    write(gguf, tmp_path / "a.nxf", {"popularity": popularity, "x.test.own": own})
    assert sections(tmp_path / "a.nxf") == {"popularity": popularity, "x.test.own": own}
    write(tmp_path / "a.nxf", tmp_path / "b.nxf", {"plan": b"{}"}, "popularity")
    assert sections(tmp_path / "b.nxf") == {"x.test.own": own, "plan": b"{}"}
    write(tmp_path / "b.nxf", tmp_path / "c.nxf", {"x.test.own": b"other"})
    assert sections(tmp_path / "c.nxf") == {"plan": b"{}", "x.test.own": b"other"}
    for name in "abc":
        assert check_file(tmp_path / f"{name}.nxf").findings == ()
    names = [(d.item, d.what) for d in diff(tmp_path / "b.nxf", tmp_path / "c.nxf")]
    assert [item for item, _ in names] == ["section x.test.own"]
    source = NxfSource(str(tmp_path / "c.nxf"))
    to_gguf(source, tmp_path / "back.gguf")
    source.close()
    assert (tmp_path / "back.gguf").read_bytes() == gguf.read_bytes()
    with NxfReader(tmp_path / "c.nxf") as reader, pytest.raises(UsageError, match="no section"):
        reader.section("draft")


@pytest.mark.parametrize(
    ("name", "contents", "without", "message"),
    [
        ("secrets", b"1", (), "'secrets' cannot be the name of a section"),
        ("x.party", b"1", (), "cannot be the name of a section"),
        ("plan", b"", (), "is empty"),
        ("plan", b"1", ("draft",), "has no section 'draft'"),
    ],
)
def test_sections_that_cannot_be_are_refused(
    name: str, contents: bytes, without: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=MoeDims(n_layers=1))
    with pytest.raises(UsageError, match=message):
        write(gguf, tmp_path / "a.nxf", {name: contents}, *without)
    assert not list(tmp_path.glob("*.nxf*"))
