"""`nexus exec` with an NXF: another program computes with its very bits, or the failure is loud."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.formats import open_model
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source
from nexus_ext.hardware.mounts import Mount
from nexus_ext.runtime import view
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.models_folder import find_model

PROGRAM = [sys.executable, str(Path(__file__).with_name("foreign_program.py"))]
NEXUS = [sys.executable, "-m", "nexus_ext.cli", "exec", "-c", "128"]


@pytest.fixture(autouse=True)
def _threads_that_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # tests share the machine


@pytest.fixture
def gguf() -> Path:
    return find_model("bitllama-3M-q4_k_m.gguf")


def convert(gguf: Path, nxf: Path, codec: str = "raw") -> Path:
    source = open_source(gguf)
    to_nxf(source, nxf, rules=Rules(codec))
    source.close()
    return nxf


@pytest.fixture
def nxf(gguf: Path, tmp_path: Path) -> Path:
    return convert(gguf, tmp_path / "the model.nxf")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False)


@functools.cache
def alone(gguf: Path) -> str:
    done = run(*PROGRAM, gguf, 6, "ignore")
    assert done.returncode == 0, done.stderr
    return done.stdout


def paged(nxf: Path, *options: str, weights: str = "1M") -> subprocess.CompletedProcess[str]:
    command = [*NEXUS, "--weights", weights, "--model", nxf]
    return run(*command, "--", *PROGRAM, nxf, 6, "load", *options)


@pytest.mark.parametrize("codec", ["raw", "ans"])
def test_a_program_streams_from_an_nxf_with_the_same_bits(
    codec: str, gguf: Path, tmp_path: Path
) -> None:
    nxf = convert(gguf, tmp_path / "m.nxf", codec)
    done = paged(nxf, "again")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone(gguf)
    assert "passes" in done.stderr.splitlines()[-1]
    (on_disk,) = [line for line in done.stderr.splitlines() if line.startswith("on disk:")]
    header = len(open_model(nxf).header)
    assert int(on_disk.split()[-1]) < header + (64 << 10) < gguf.stat().st_size, "weights copied"
    assert "not opened again" in done.stderr, "who opens the view now would read zeros"


def test_everything_fits_and_the_backend_still_reads_it(gguf: Path, nxf: Path) -> None:
    done = paged(nxf, weights="1G")
    assert (done.returncode, done.stdout) == (0, alone(gguf)), done.stderr
    assert "0 B used per pass" in done.stderr


def test_experts_stream_from_records(tmp_path: Path) -> None:
    dims = MoeDims(n_layers=3, n_experts=16, n_used=2)
    (gguf,) = write_moe(tmp_path / "moe.gguf", arch="qwen3moe", dims=dims, quant="F16")
    nxf = convert(gguf, tmp_path / "moe.nxf", "ans")
    done = paged(nxf, weights="900K")
    assert (done.returncode, done.stdout) == (0, alone(gguf)), done.stderr


@pytest.mark.parametrize("kept", ["token_embd", r"blk\.[01]\.ffn_(up|down)|output_norm"])
def test_what_the_program_keeps_from_the_backend_is_right_too(
    kept: str, gguf: Path, nxf: Path
) -> None:
    done = paged(nxf, f"own={kept}")
    assert (done.returncode, done.stdout) == (0, alone(gguf)), done.stderr


def test_what_it_would_read_itself_from_the_hole_is_refused(nxf: Path) -> None:
    done = paged(nxf, "own=blk.0.ffn_up", "no-mmap")
    assert done.returncode != 0
    assert "blk.0.ffn_up.weight is kept from the backend" in done.stderr


def test_without_mmap_the_bits_are_the_same(gguf: Path, nxf: Path) -> None:
    done = paged(nxf, "no-mmap")
    assert (done.returncode, done.stdout) == (0, alone(gguf)), done.stderr


def test_a_program_that_keeps_all_weights_is_refused(nxf: Path) -> None:
    done = paged(nxf, "own=.*")
    assert done.returncode != 0
    assert "keeps all weights from the backend" in done.stderr


def test_a_program_without_the_backend_cannot_open_the_view(nxf: Path) -> None:
    done = run(*NEXUS, "--weights", "1M", "--model", nxf, "--", *PROGRAM, nxf, 2, "ignore")
    assert done.returncode != 0
    assert "never loaded the backend" in done.stderr
    assert not done.stdout, "tokens out of zeros"


def test_another_file_in_the_place_of_the_view_is_refused(gguf: Path, nxf: Path) -> None:
    script = '"$0" "$1" "$2" 2 load; exit $?'
    command = [*NEXUS, "--weights", "1M", "--model", nxf, "--", "/bin/sh", "-c", script]
    done = run(*command, *PROGRAM, gguf, nxf)
    assert done.returncode != 0
    assert "another file than the one that was planned for" in done.stderr


def test_no_view_is_left_behind(nxf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    command = [*NEXUS, "--json", "--weights", "1M", "--model", nxf, "--", "/bin/sh", "-c"]
    done = run(*command, 'test -s "$0" && echo "$0"', nxf)
    assert done.stdout.splitlines()[0].startswith(str(folder)), done.stderr
    found, _ = json.JSONDecoder().raw_decode(done.stdout.partition("\n")[2])
    assert found["report"]["n_allocated"] == 0
    assert not list(folder.iterdir())


def test_a_view_is_no_file_in_memory(
    nxf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_model(nxf)
    memory = Mount("/", "/", "", "tmpfs", "tmpfs", ())
    monkeypatch.setattr(view, "read_mounts", lambda system: (memory,))
    with pytest.raises(UsageError, match="tmpfs") as failure, view.view_of(catalog):
        raise AssertionError("in memory")
    assert "TMPDIR" in failure.value.hint
    disk = Mount(str(tmp_path.resolve()), "/", "", "ext4", "/dev/vda", ())
    monkeypatch.setattr(view, "read_mounts", lambda system: (memory, disk))
    with view.view_of(catalog) as path:  # beside the model
        assert path.parent.parent == tmp_path.resolve() and path.name == "the model.gguf"


@pytest.mark.parametrize("form", ["{}", "--model={}"])
def test_every_argument_that_is_the_model_is_replaced(
    form: str, nxf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(nxf.parent)
    given = form.format("./" + nxf.name)
    found = view.with_view(["program", "-m", given, "-x=1"], str(nxf), Path("/v.gguf"))
    assert found == ["program", "-m", form.format("/v.gguf"), "-x=1"]
    with pytest.raises(UsageError, match="no argument of program"):
        view.with_view(["program", "-m", "other"], str(nxf), Path("/v.gguf"))
