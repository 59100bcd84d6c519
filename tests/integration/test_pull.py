"""Downloads from a server that behaves as Hugging Face does, well and badly."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.errors import FormatError, ModelNotFound, NexusError, UsageError, WriteFailed
from nexus_ext.store.hub import DownloadFailed, Hub, RemoteFile, known_token
from nexus_ext.store.own import OwnStore
from nexus_ext.store.pull import Progress, choose, parse_reference, pull
from nexus_ext.testing.synthetic import write_llama
from tests.cli_support import call
from tests.fake_engine import FakeEngine
from tests.models_folder import find_model
from tests.server_support import client_of, library_with, lines

COMMIT = "c0ffee" * 6 + "abcd"
REPO = "user/tiny-GGUF"
DIMS = {"n_layers": 2, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 300}


@dataclass
class Repository:
    """What the fake server has, and how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    cut_after: int | None = None  # bytes of each answer before the connection is closed
    n_busy: int = 0  # answers with 503 first
    ranges: bool = True
    token: str | None = None
    wrong_sha: bool = False
    redirect_to: str | None = None
    port: int = 0

    def tree(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "sub", "size": 0}]
        for path, data in self.files.items():
            digest = hashlib.sha256(data + b"x" * self.wrong_sha).hexdigest()
            entry = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
            entries.append({**entry, "lfs": {"oid": digest, "size": len(data)}})
        return [*entries, {"type": "file", "path": "README.md", "size": 3, "oid": "1" * 40}]


def handler_of(repository: Repository) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            cut = repository.cut_after
            self.wfile.write(data if cut is None else data[:cut])
            self.close_connection = True

        def do_GET(self) -> None:
            key = self.headers.get("Authorization")
            wanted = self.headers.get("Range")
            repository.requests.append((self.path, wanted, key))
            if repository.n_busy:
                repository.n_busy -= 1
                self._send(503, b"")
            elif repository.token and key != f"Bearer {repository.token}":
                self._send(401, b"")
            elif self.path == f"/api/models/{REPO}/revision/main":
                self._send(200, json.dumps({"sha": COMMIT}).encode())
            elif self.path == f"/api/models/{REPO}/tree/{COMMIT}?recursive=true":
                self._send(200, json.dumps(repository.tree()).encode())
            elif self.path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
                if repository.redirect_to:
                    self._send(302, b"", Location=repository.redirect_to + self.path)
                else:
                    self._file(self.path.rpartition(f"{COMMIT}/")[2], wanted)
            else:
                self._send(404, b"")

        def _file(self, path: str, wanted: str | None) -> None:
            data = repository.files[path]
            if wanted and repository.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self._send(206, data[start:])
            else:
                self._send(200, data)

    return Handler


def served(repository: Repository) -> Iterator[Repository]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(repository))
    repository.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield repository
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def data() -> bytes:
    return find_model("stories260K-q4_0.gguf").read_bytes()


@pytest.fixture
def remote(data: bytes) -> Iterator[Repository]:
    yield from served(Repository({"tiny-Q4_0.gguf": data, "tiny-Q8_0.gguf": data[:100]}))


@pytest.fixture
def other() -> Iterator[Repository]:
    yield from served(Repository())


@pytest.fixture
def own(tmp_path: Path) -> OwnStore:
    return OwnStore(tmp_path / "store")


def hub(remote: Repository, token: str = "") -> Hub:
    return Hub(f"http://127.0.0.1:{remote.port}", token)


def ranges(remote: Repository) -> list[str | None]:
    return [wanted for path, wanted, _ in remote.requests if "/resolve/" in path]


def test_a_model_is_downloaded_verified_and_named(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    seen: list[Progress] = []

    def report(progress: Progress) -> bool:
        seen.append(progress)
        return False

    made = pull(f"{REPO}:Q4_0", own, hub=hub(remote), report=report)
    assert str(made.name) == f"{REPO}:Q4_0" and Path(made.path).read_bytes() == data
    assert seen[-1].done_bytes == seen[-1].total_bytes == len(data)
    assert COMMIT in made.source
    n = len(remote.requests)
    pull(f"hf.co/{REPO}:q4_0", own, hub=hub(remote))
    assert len(remote.requests) == n + 2, "what is there is not downloaded again"


def test_a_download_goes_on_where_it_stopped(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    def stop(progress: Progress) -> bool:
        return True

    remote.files["tiny-Q4_0.gguf"] = data
    half = len(data) // 2
    remote.cut_after = half
    with pytest.raises(DownloadFailed, match="stopped"):
        pull(f"{REPO}:Q4_0", own, hub=hub(remote), report=stop)
    assert own.names() == [], "no name before the file is whole"
    remote.cut_after = None
    made = pull(f"{REPO}:Q4_0", own, hub=hub(remote))
    assert ranges(remote) == [None, f"bytes={half}-"]
    assert Path(made.path).read_bytes() == data


def test_a_connection_that_breaks_is_made_again(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    remote.cut_after = 100_000
    made = pull(f"{REPO}:Q4_0", own, hub=hub(remote), retry_s=0)
    assert Path(made.path).read_bytes() == data
    assert ranges(remote) == [None, "bytes=100000-", "bytes=200000-"]


def test_an_error_of_tls_in_the_middle_is_a_connection_that_breaks(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    class Cut:
        """An answer that ends with an error of the TLS layer."""

        def __init__(self, answer: Any) -> None:
            self._pieces = [answer.read(1000)]

        def __enter__(self) -> Cut:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            if not self._pieces:
                raise ssl.SSLError("DECRYPTION_FAILED_OR_BAD_RECORD_MAC")
            return self._pieces.pop()

    class Flaky(Hub):
        n_opened = 0

        def open(self, *arguments: Any) -> Any:
            answer, start = super().open(*arguments)
            self.n_opened += 1
            return (Cut(answer) if self.n_opened == 1 else answer), start

    flaky = Flaky(f"http://127.0.0.1:{remote.port}", "")
    made = pull(f"{REPO}:Q4_0", own, hub=flaky, retry_s=0)
    assert Path(made.path).read_bytes() == data and flaky.n_opened == 2


def test_a_disk_that_takes_no_more_is_no_broken_connection(
    remote: Repository, own: OwnStore
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteFailed, match="cannot be written: File too large") as failed:
            pull(f"{REPO}:Q4_0", own, hub=hub(remote), retry_s=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.errno == errno.EFBIG and own.names() == []
    assert pull(f"{REPO}:Q4_0", own, hub=hub(remote)).nbytes > 100_000, "it goes on"


def test_a_server_that_brings_nothing_is_given_up_and_the_part_kept(
    remote: Repository, own: OwnStore
) -> None:
    remote.cut_after = 0

    class Deaf(Hub):
        def _json(self, url: str, repository: str) -> Any:
            return {"sha": COMMIT} if "revision" in url else remote.tree()

    with pytest.raises(DownloadFailed, match="broke off"):
        pull(f"{REPO}:Q4_0", own, hub=Deaf(f"http://127.0.0.1:{remote.port}", ""), retry_s=0)
    assert len(ranges(remote)) == 5
    assert [f.suffix for f in own.files.rglob("*") if f.is_file()] == [".part"]


def test_a_server_without_ranges_sends_it_all_again(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    remote.ranges, remote.cut_after = False, 200_000
    with pytest.raises(DownloadFailed):
        pull(f"{REPO}:Q4_0", own, hub=hub(remote), report=lambda progress: True)
    remote.cut_after = None
    assert Path(pull(f"{REPO}:Q4_0", own, hub=hub(remote)).path).read_bytes() == data


def test_bytes_that_are_not_those_announced_are_thrown_away(
    remote: Repository, own: OwnStore
) -> None:
    remote.wrong_sha = True
    with pytest.raises(DownloadFailed, match="sha256"):
        pull(f"{REPO}:Q4_0", own, hub=hub(remote))
    assert [f for f in own.files.rglob("*") if f.is_file()] == [] and own.names() == []


def test_a_file_that_is_no_model_gets_no_name(remote: Repository, own: OwnStore) -> None:
    with pytest.raises(FormatError):
        pull(f"{REPO}:Q8_0", own, hub=hub(remote))
    assert own.names() == []


def test_a_busy_server_is_one_sentence(remote: Repository, own: OwnStore) -> None:
    remote.n_busy = 1
    with pytest.raises(DownloadFailed, match="503"):
        pull(f"{REPO}:Q4_0", own, hub=hub(remote))


def test_a_token_goes_to_its_server_and_nowhere_else(
    remote: Repository, other: Repository, own: OwnStore, data: bytes
) -> None:
    remote.token = "s3cret"
    with pytest.raises(DownloadFailed, match="HTTP 401"):
        pull(f"{REPO}:Q4_0", own, hub=hub(remote))
    remote.redirect_to = f"http://127.0.0.1:{other.port}"
    other.files = {"tiny-Q4_0.gguf": data}
    pull(f"{REPO}:Q4_0", own, hub=hub(remote, "s3cret"))
    assert {key for *_, key in remote.requests[1:]} == {"Bearer s3cret"}
    assert [key for *_, key in other.requests] == [None]


def test_a_split_model_comes_with_all_its_parts(
    remote: Repository, own: OwnStore, tmp_path: Path
) -> None:
    paths = write_llama(tmp_path / "big-Q4_0.gguf", split=3, **DIMS)
    remote.files = {f"sub/{path.name}": path.read_bytes() for path in paths}
    made = pull(REPO, own, hub=hub(remote))
    assert str(made.name) == f"{REPO}:Q4_0"
    assert made.nbytes == sum(path.stat().st_size for path in paths)


def test_somebody_elses_download_is_not_disturbed(
    remote: Repository, own: OwnStore, data: bytes
) -> None:
    def again(progress: Progress) -> bool:
        with pytest.raises(UsageError, match="another process"):
            pull(f"{REPO}:Q4_0", own, hub=hub(remote))
        return False

    assert Path(pull(f"{REPO}:Q4_0", own, hub=hub(remote), report=again).path).is_file()


@pytest.mark.parametrize(
    ("names", "wanted", "tag"),
    [
        (["m-Q4_K_M.gguf", "m-Q8_0.gguf"], None, "Q4_K_M"),
        (["m-Q8_0.gguf"], None, "Q8_0"),
        (["m.Q5_K_S.gguf", "m.Q6_K.gguf"], "q6_k", "Q6_K"),
        (["a/m-UD-IQ2_XXS.gguf", "mmproj-F16.gguf"], None, "UD-IQ2_XXS"),
        (["stories.gguf", "other.gguf"], "stories", "stories"),
    ],
)
def test_what_is_meant_is_found(names: list[str], wanted: str | None, tag: str) -> None:
    files = [RemoteFile(name, 1, "0" * 64) for name in names]
    assert choose(files, wanted, REPO)[1] == tag


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], None),
        (["m-Q8_0.gguf", "m-Q6_K.gguf"], None),
        (["m-Q8_0.gguf"], "Q4_0"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0"),
        (["x.safetensors"], None),
    ],
)
def test_what_is_not_clear_is_asked(names: list[str], wanted: str | None) -> None:
    with pytest.raises(UsageError):
        choose([RemoteFile(name, 1, "0" * 64) for name in names], wanted, REPO)


def test_references_are_repositories() -> None:
    assert parse_reference("https://huggingface.co/u/r:Q") == ("u/r", "Q")
    assert parse_reference("hf.co/u/r") == ("u/r", None)
    for wrong in ("qwen3", "a/b/c", "../x", "u/..:q"):
        with pytest.raises(UsageError):
            parse_reference(wrong)


def test_a_repository_that_there_is_not(remote: Repository, own: OwnStore) -> None:
    with pytest.raises(ModelNotFound):
        pull("user/other", own, hub=hub(remote))
    with pytest.raises(NexusError, match="cannot be reached"):
        pull("user/other", own, hub=Hub("http://127.0.0.1:1", ""))
    with pytest.raises(UsageError, match="no http"):
        Hub("ftp://x")


def test_tokens_are_found_where_hugging_face_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    assert known_token({"HF_HOME": str(tmp_path)}) == "abc"
    assert known_token({"HF_HOME": str(tmp_path), "HF_TOKEN": "x"}) == "x"
    assert known_token({"HF_HOME": str(tmp_path / "none")}) is None


def test_the_verb_and_the_endpoint_download_too(
    remote: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{remote.port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = call("pull", f"{REPO}:Q4_0", "--as", "mine", "--store", tmp_path / "a")
    assert done.status == 0 and "mine:latest is" in done.out
    library = library_with(tmp_path / "b", find_model("stories260K-q4_0.gguf"))
    with client_of(FakeEngine([]), library) as client:
        statuses = lines(client.post("/api/pull", json={"model": f"{REPO}:Q4_0"}))
        assert statuses[0] == {"status": "pulling manifest"}
        assert statuses[1]["total"] > 0 and statuses[-1] == {"status": "success"}
        assert library.find(f"{REPO}:Q4_0").nbytes > 0
        failed = lines(client.post("/api/pull", json={"model": f"{REPO}:Q2_K"}))
        assert "Q8_0" in failed[-1]["error"]
        whole = client.post("/api/pull", json={"model": f"{REPO}:Q4_0", "stream": False})
        assert whole.json() == {"status": "success"}
