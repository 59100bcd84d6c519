"""An NXF appears whole or not at all: kills, full disks, interrupts, and two writers at once."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ext.errors import FormatError, UsageError, WriteFailed
from nexus_ext.formats import direct_write, new_file, nxf_parts, open_model
from nexus_ext.formats.diff import diff
from nexus_ext.formats.nxf_convert import Report, to_gguf, to_nxf
from nexus_ext.formats.nxf_file import read_nxf
from nexus_ext.formats.nxf_header import DRAFT_MAGIC
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.nxf_verify import check_file
from nexus_ext.formats.nxf_writer import NxfWriter
from nexus_ext.formats.sources import NxfSource, open_source
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe

# Converts in a process of its own, which it kills when told to.
CHILD = """
import os, signal, sys
from nexus_ext.formats import direct_write, new_file, nxf_convert
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source

source, target, codec, when, shard = sys.argv[1:]
calls = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    global calls
    calls += 1
    if str(calls) == when:
        die()

if os.environ["WRITING"] == "direct":
    new_file.DIRECT_FROM_NBYTES, direct_write.PIECE_NBYTES = 0, 8192
if when == "sync":
    os.fsync = die
if when == "rename":
    os.replace = die
nxf_convert.to_nxf(open_source(source), target, rules=Rules(codec), overwrite=True,
                   progress=progress, shard_nbytes=int(shard) or None)
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = MoeDims(n_layers=3, n_experts=8)
    return write_moe(tmp_path_factory.mktemp("w") / "m.gguf", dims=dims, quant="BF16")[0]


@pytest.fixture(params=["buffered", "direct"], autouse=True)
def writing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through the page cache, as small models are written, and past it."""
    how: str = request.param
    monkeypatch.setenv("WRITING", how)
    if how == "direct":
        monkeypatch.setattr(new_file, "DIRECT_FROM_NBYTES", 0)
        monkeypatch.setattr(direct_write, "PIECE_NBYTES", 8192)
    return how


def convert(gguf: Path, target: Path, codec: str = "raw", **options: object) -> Report:
    source = open_source(gguf)
    try:
        return to_nxf(source, target, rules=Rules(codec), **options)  # type: ignore[arg-type]
    finally:
        source.close()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("when", "codec", "shard"),
    [
        ("1", "raw", 0),
        ("17", "ans", 0),
        ("60", "raw", 90_000),
        ("sync", "raw", 0),
        ("rename", "ans", 0),
    ],
)
def test_a_kill_leaves_the_old_file_and_a_draft_that_is_taken_up(
    gguf: Path, when: str, codec: str, shard: int, writing: str, tmp_path: Path
) -> None:
    target, shards = tmp_path / "m.nxf", shard or None
    target.write_bytes(b"what was there before")
    arguments = [str(gguf), str(target), codec, when, str(shard)]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"what was there before"
    draft = tmp_path / "m.nxf.part"
    if when not in ("sync", "rename"):
        assert draft.read_bytes()[:8] == DRAFT_MAGIC
        with pytest.raises(FormatError, match="is unfinished"):
            read_nxf(str(draft))
    report = convert(gguf, target, codec, overwrite=True, shard_nbytes=shards)
    if when in ("sync", "rename"):  # all of it was there, and the header of a whole file
        assert report.resumed_nbytes == 0
    elif writing == "buffered" or shard:  # else it is in a piece that was not full
        assert report.resumed_nbytes > 0
    assert len(report.paths) > 2 or not shard
    convert(gguf, tmp_path / "o.nxf", codec, shard_nbytes=shards)
    if not shard:
        assert target.read_bytes() == (tmp_path / "o.nxf").read_bytes()
    assert check_file(target).findings == ()
    assert diff(target, gguf) == []
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["raw", "ans"])
def test_kills_at_any_moment_leave_no_broken_file(codec: str, tmp_path: Path) -> None:
    """Kill a conversion 25 times, later and later, and let the last attempt end."""
    dims = MoeDims(n_layers=8, n_experts=32, n_embd=512, n_ff=512)
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=dims, quant="BF16")
    target = tmp_path / "m.nxf"
    arguments = [str(gguf), str(target), codec, "never", "0"]
    rng = random.Random(codec)
    killed = 0
    for attempt in range(25):
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments])
        try:
            child.wait(0.3 + rng.random() * 0.1 * (attempt + 1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            killed += 1
        if target.exists():
            assert check_file(target).findings == ()
            target.unlink()
    assert killed > 5
    convert(gguf, target, codec)
    assert check_file(target).findings == ()
    assert diff(target, gguf) == []


def test_a_draft_is_believed_as_far_as_its_hashes_are_right(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.nxf"
    arguments = [str(gguf), str(target), "raw", "50", "0"]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, timeout=60)
    draft = tmp_path / "m.nxf.part"
    good = convert(gguf, tmp_path / "o.nxf")
    damaged = bytearray(draft.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    draft.write_bytes(damaged)
    report = convert(gguf, target)
    assert 0 < report.resumed_nbytes < good.nbytes // 2
    assert target.read_bytes() == (tmp_path / "o.nxf").read_bytes()


def test_a_draft_of_another_conversion_is_thrown_away(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.nxf"
    arguments = [str(gguf), str(target), "ans", "50", "0"]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, timeout=60)
    assert convert(gguf, target, "raw").resumed_nbytes == 0
    assert diff(target, gguf) == []


def test_an_interrupt_keeps_what_was_written(gguf: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(gguf, tmp_path / "m.nxf", progress=progress)
    assert leftovers(tmp_path) == ["m.nxf.part"]
    assert convert(gguf, tmp_path / "m.nxf").resumed_nbytes > 0


def test_an_error_removes_what_was_written(gguf: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        convert(gguf, tmp_path / "m.nxf", progress=progress)
    assert leftovers(tmp_path) == []


def test_a_full_disk_says_so_and_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match="cannot be written: File too large") as caught:
            convert(gguf, tmp_path / "m.nxf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert "Free some space" in caught.value.hint
    assert leftovers(tmp_path) == []


FILL = """
import sys
from pathlib import Path
from nexus_ext.errors import WriteFailed
from nexus_ext.formats import direct_write, new_file, nxf_convert
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source
source, folder, direct = sys.argv[1:]
new_file.DIRECT_FROM_NBYTES = 0 if direct == "direct" else 1 << 60
try:
    nxf_convert.to_nxf(open_source(source), folder + "/m.nxf", rules=Rules("ans"))
except WriteFailed as error:
    print(error.errno, error.hint, [path.name for path in Path(folder).iterdir()])
"""


def test_a_disk_that_fills_up_on_the_way(writing: str, tmp_path: Path) -> None:
    """A file system with room for what `ans` usually leaves of such weights, which are random."""
    folder, gguf = tmp_path / "small", tmp_path / "m.gguf"
    folder.mkdir()
    write_llama(
        gguf, n_layers=1, n_embd=2048, n_ff=4096, n_heads=8, n_heads_kv=8, n_vocab=7000,
        quant="Q4_K",
    )  # fmt: skip
    assert 38 << 20 < gguf.stat().st_size < 42 << 20
    mount = f"mount -t tmpfs -o size=38m tmpfs '{folder}'"
    shell = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*shell, mount]).returncode:
        pytest.skip("this user may not mount a file system")
    command = [*shell, f'{mount} && exec "$@"', "sh", sys.executable, "-c", FILL]
    done = subprocess.run([*command, str(gguf), str(folder), writing], capture_output=True)
    assert done.returncode == 0, done.stderr
    errno_, hint = str(errno.ENOSPC), "Free some space, or write to another disk."
    assert done.stdout.decode() == f"{errno_} {hint} []\n"


@pytest.mark.parametrize("at", [0, 3, 40])
def test_a_write_that_fails_is_named_and_leaves_nothing(
    gguf: Path, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, pwrite = 0, os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:1000], offset)  # and in pieces before

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteFailed, match=r"m\.nxf.*: cannot be written: No space left on device"):
        convert(gguf, tmp_path / "m.nxf", shard_nbytes=90_000)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("flush_nbytes", [50_000, 1 << 40])
def test_a_disk_that_fails_behind_the_writing_is_noticed(
    flush_nbytes: int, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fsync(descriptor: int) -> None:
        # The last one that is waited for: as the system does, it tells once.
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(nxf_parts, "_FLUSH_NBYTES", flush_nbytes)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WriteFailed, match="cannot be written: Input/output error"):
        convert(gguf, tmp_path / "m.nxf")
    assert leftovers(tmp_path) == []


def test_too_little_space_is_said_before_anything_is_written(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 17 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(WriteFailed, match=r"are to be written, 17.0 MiB are free"):
        convert(gguf, tmp_path / "m.nxf")
    assert leftovers(tmp_path) == []


def test_nothing_is_overwritten_without_being_told(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.nxf"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        convert(gguf, target)
    assert target.read_bytes() == b"precious"
    convert(gguf, target, overwrite=True, shard_nbytes=90_000)
    old = leftovers(tmp_path)
    convert(gguf, target, "ans", overwrite=True, shard_nbytes=90_000)
    new = leftovers(tmp_path)
    assert set(old) & set(new) == {"m.nxf"}  # the shards of the old one are gone
    assert open_model(target).container == "nxf"
    with pytest.raises(UsageError, match="does not exist"):
        convert(gguf, tmp_path / "nowhere" / "m.nxf")
    source = NxfSource(str(target))
    (tmp_path / "b.gguf").write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        to_gguf(source, tmp_path / "b.gguf")
    source.close()
    assert (tmp_path / "b.gguf").read_bytes() == b"precious"


def test_two_writers_of_one_file_do_not_mix(gguf: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done == total:
            with pytest.raises(UsageError, match="another process is writing it"):
                convert(gguf, tmp_path / "m.nxf")

    convert(gguf, tmp_path / "m.nxf", progress=progress)
    assert diff(tmp_path / "m.nxf", gguf) == []


def test_a_writer_refuses_to_be_misused(gguf: Path, tmp_path: Path) -> None:
    convert(gguf, tmp_path / "m.nxf")
    nxf = read_nxf(str(tmp_path / "m.nxf")).nxf
    from nexus_ext.formats.nxf_layout import steps

    plan = list(steps(nxf, Rules(), 4096))
    writer = NxfWriter(tmp_path / "w.nxf", nxf, plan)
    with pytest.raises(UsageError, match="is not the next one"):
        writer.add(plan[1], bytes(plan[1].nbytes), "raw")
    with pytest.raises(UsageError, match="chunks were not stored"):
        writer.finish()
    with pytest.raises(UsageError, match="is open, not finished"):
        writer.paths()
    writer.discard()
    writer.discard()
    with pytest.raises(UsageError, match="is closed, not open"):
        writer.add(plan[0], bytes(plan[0].nbytes), "raw")
    assert not (tmp_path / "w.nxf.part").exists()
    with pytest.raises(UsageError, match="no order of 8 experts"):
        list(steps(nxf, Rules(), 4096, lambda layer, count: [0] * count))


def test_a_source_that_shrinks_while_it_is_read_is_noticed(gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c.gguf"
    copy.write_bytes(gguf.read_bytes())
    source = open_source(copy)
    os.truncate(copy, copy.stat().st_size - 5000)
    with pytest.raises(OSError, match=r"ends before byte|ended"):
        to_nxf(source, tmp_path / "m.nxf")
    source.close()
    assert leftovers(tmp_path) == ["c.gguf"]
