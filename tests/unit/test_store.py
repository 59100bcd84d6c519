"""Models by name: what a name may be, three stores, and that only ours is ever written."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import FormatError, ModelNotFound, UsageError, WriteFailed
from nexus_ext.store import Library, ModelName
from nexus_ext.store.library import default_root
from nexus_ext.store.lm_studio import LmStudioStore
from nexus_ext.store.ollama import OllamaStore
from nexus_ext.store.own import OwnStore
from nexus_ext.testing.synthetic import write_llama
from tests.models_folder import find_model

DIMS = {"n_layers": 2, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 300}


@pytest.fixture(scope="module")
def model() -> Path:
    return find_model("stories260K-q4_0.gguf")


@pytest.fixture
def own(tmp_path: Path) -> OwnStore:
    return OwnStore(tmp_path / "store")


def blob(root: Path, data: bytes) -> tuple[str, int]:
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    return f"sha256:{digest}", len(data)


def ollama_model(root: Path, path: str, **layers: bytes) -> Path:
    """Write a manifest and its blobs as Ollama does."""
    entries = []
    for kind, data in layers.items():
        digest, size = blob(root, data)
        media = f"application/vnd.ollama.image.{kind}"
        entries.append({"mediaType": media, "digest": digest, "size": size})
    file = root / "manifests" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"schemaVersion": 2, "layers": entries}))
    return file


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("qwen3", "qwen3:latest"),
        ("qwen3:8b", "qwen3:8b"),
        ("user/repo-GGUF:Q4_K_M", "user/repo-GGUF:Q4_K_M"),
        ("hf.co/user/repo:x", "hf.co/user/repo:x"),
    ],
)
def test_names_are_parsed_as_people_write_them(text: str, full: str) -> None:
    assert str(ModelName.parse(text)) == full


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", "../a", "a/../b", "/a", "a//b", "a/", "a/b/c/d", "a\\b", "a b", "a:b:c",
     ".hidden", "a:..", "a/..:b", "~/a", "a\0b", "é", "x" * 97, "C:\\x", "a%2e%2e/b"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        ModelName.parse(text)


@given(st.text(alphabet="ab./:\\~@-_%\0 ", max_size=20))
def test_whatever_is_a_name_stays_inside_the_store(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except UsageError:
        return
    root = Path("/store")
    file = OwnStore(root)._file(name)
    assert file.resolve().is_relative_to(root / "manifests")
    assert ModelName.parse(str(name)) == name


def test_a_created_model_is_read_where_it_lies(own: OwnStore, model: Path) -> None:
    name = ModelName.parse("tiny:v1")
    made = own.create(
        name, model, template="T", system="S", parameters={"temperature": 0, "stop": "x"}
    )
    assert own.find(name) == made
    assert (made.path, made.template, made.system) == (str(model.resolve()), "T", "S")
    assert made.parameters == {"temperature": 0.0, "stop": ["x"]}
    assert made.nbytes == model.stat().st_size
    assert own.names() == [name]
    assert own.remove(name) == 0
    assert model.is_file() and own.names() == []


def test_a_copied_model_belongs_to_the_store(own: OwnStore, model: Path) -> None:
    one, two = ModelName.parse("one"), ModelName.parse("two")
    made = own.create(one, model, copy=True)
    assert Path(made.path).is_relative_to(own.files) and Path(made.path).read_bytes()
    own.copy(made, two)
    assert own.remove(one) == 0, "another name still has the file"
    assert Path(made.path).is_file()
    assert own.remove(two) == model.stat().st_size
    assert not Path(made.path).exists() and list(own.files.iterdir()) == []


def test_a_split_model_is_stored_with_all_its_parts(own: OwnStore, tmp_path: Path) -> None:
    paths = write_llama(tmp_path / "m.gguf", split=3, **DIMS)
    made = own.create(ModelName.parse("split"), paths[1], copy=True)
    assert made.nbytes == sum(path.stat().st_size for path in paths)
    assert len(list(Path(made.path).parent.iterdir())) == 3
    assert made.path.endswith("00001-of-00003.gguf")


def test_a_file_that_is_no_model_gets_no_name(own: OwnStore, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model" * 10)
    with pytest.raises(FormatError):
        own.create(ModelName.parse("x"), tmp_path / "x.gguf")
    assert own.names() == []


@pytest.mark.parametrize("copy", [False, True])
def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, model: Path, copy: bool) -> None:
    (tmp_path / "file").touch()
    own = OwnStore(tmp_path / "file" / "store")
    with pytest.raises(WriteFailed, match=r"file/store' cannot be written: Not a directory"):
        own.create(ModelName.parse("x"), model, copy=copy)


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file' is no directory"):
        Library.at(tmp_path / "file", ollama="", lm_studio="")


def test_a_name_that_cannot_be_removed_is_an_error(
    own: OwnStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    own.create(ModelName.parse("x"), model)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(WriteFailed, match="Permission denied"):
        own.remove(ModelName.parse("x"))
    assert own.names() == [ModelName.parse("x")]


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"temperature": "hot"}, "hot"), ({"top_k": 1.5}, "whole"), ({"stop": 3}, "text"),
     ({"top_p": True}, "number")],
)  # fmt: skip
def test_parameters_that_are_none_are_refused(
    own: OwnStore, model: Path, parameters: dict[str, object], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        own.create(ModelName.parse("x"), model, parameters=parameters)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ("{", "JSON"),
        ("[]", "version"),
        ('{"version": 2}', "version 1"),
        ('{"version": 1, "path": 5, "nbytes": 1}', "path"),
        ('{"version": 1, "path": "../../x", "nbytes": 1}', "out of the store"),
        ('{"version": 1, "path": "/x", "nbytes": 1, "parameters": 5}', "parameters"),
        ('{"version": 1, "path": "/x", "nbytes": 1, "template": 5}', "template"),
    ],
)
def test_a_broken_manifest_is_named(own: OwnStore, raw: str, word: str) -> None:
    file = own.root / "manifests" / "bad" / "@latest.json"
    file.parent.mkdir(parents=True)
    file.write_text(raw)
    with pytest.raises(FormatError, match=word):
        own.find(ModelName.parse("bad"))


def test_an_ollama_store_is_read_in_place(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "ollama"
    ollama_model(
        root,
        "registry.ollama.ai/library/tiny/1b",
        model=model.read_bytes(),
        template=b"{{ .Prompt }}",
        params=b'{"temperature": 0.5, "stop": ["<end>"], "num_gpu": 9}',
        system=b"Be brief.",
        license=b"MIT",
    )
    ollama_model(root, "registry.ollama.ai/someone/tiny/latest", model=model.read_bytes())
    ollama_model(root, "hf.co/user/repo/Q4_0", model=model.read_bytes())
    before = sorted(root.rglob("*"))
    store = OllamaStore(root)
    assert [str(n) for n in store.names()] == [
        "hf.co/user/repo:Q4_0",
        "someone/tiny:latest",
        "tiny:1b",
    ]
    found = store.find(ModelName.parse("tiny:1b"))
    assert found is not None
    assert Path(found.path).read_bytes() == model.read_bytes()
    assert found.parameters == {"temperature": 0.5, "stop": ["<end>"]}
    assert (found.system, found.license, found.template) == ("Be brief.", "MIT", None)
    assert "Go template" in found.notes[0]
    for name in ("someone/tiny", "hf.co/user/repo:Q4_0"):
        assert store.find(ModelName.parse(name)) is not None
    assert store.find(ModelName.parse("tiny")) is None
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("manifest", "word"),
    [
        ("{", "no manifest"),
        ('{"layers": 5}', "no manifest"),
        ('{"layers": []}', "weights"),
        ('{"layers": [{"mediaType": "application/vnd.ollama.image.model", '
         '"digest": "sha256:../../../etc/passwd"}]}', "no sha256"),
        ('{"layers": [{"mediaType": "application/vnd.ollama.image.model", '
         '"digest": "sha256:' + "0" * 64 + '"}]}', "not in"),
    ],
)  # fmt: skip
def test_a_broken_ollama_manifest_is_named(tmp_path: Path, manifest: str, word: str) -> None:
    file = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "bad" / "latest"
    file.parent.mkdir(parents=True)
    file.write_text(manifest)
    with pytest.raises(FormatError, match=word):
        OllamaStore(tmp_path).find(ModelName.parse("bad"))


def test_an_ollama_model_with_an_adapter_is_not_run_without_it(tmp_path: Path) -> None:
    ollama_model(tmp_path, "registry.ollama.ai/library/x/latest", model=b"m", adapter=b"a")
    with pytest.raises(UsageError, match="LoRA"):
        OllamaStore(tmp_path).find(ModelName.parse("x"))


def test_an_lm_studio_folder_is_read_in_place(tmp_path: Path, model: Path) -> None:
    repo = tmp_path / "someone" / "tiny model-GGUF"
    repo.mkdir(parents=True)
    (repo / "tiny-Q4_0.gguf").write_bytes(model.read_bytes())
    (repo / "mmproj-tiny.gguf").write_bytes(b"eyes")
    split = write_llama(repo / "big.gguf", split=2, **DIMS)
    store = LmStudioStore(tmp_path)
    assert [str(n) for n in store.names()] == [
        "someone/tiny-model-GGUF:big",
        "someone/tiny-model-GGUF:tiny-Q4_0",
    ]
    found = store.find(ModelName.parse("someone/tiny-model-GGUF:tiny-Q4_0"))
    assert found is not None and found.path == str(repo / "tiny-Q4_0.gguf")
    big = store.find(ModelName.parse("someone/tiny-model-GGUF:big"))
    assert big is not None and big.nbytes == sum(p.stat().st_size for p in split)


def test_our_own_names_come_first_and_foreign_ones_cannot_be_removed(
    tmp_path: Path, model: Path
) -> None:
    root = tmp_path / "ollama"
    ollama_model(root, "registry.ollama.ai/library/tiny/latest", model=model.read_bytes())
    library = Library.at(tmp_path / "own", ollama=root, lm_studio="")
    assert library.find("tiny").origin == "ollama"
    with pytest.raises(ModelNotFound):
        library.own.remove(ModelName.parse("tiny"))
    library.own.copy(library.find("tiny"), ModelName.parse("tiny"))
    assert library.find("tiny").origin == "nexus"
    assert [str(m.name) for m in library.models()] == ["tiny:latest"]


def test_an_unknown_model_is_never_another_one(tmp_path: Path, model: Path) -> None:
    library = Library.at(tmp_path, ollama="", lm_studio="")
    library.own.create(ModelName.parse("tiny:v1"), model)
    for name in ("tiny", "tin", "tiny:v2", "TINY:v1", "../tiny:v1"):
        with pytest.raises(ModelNotFound):
            library.find(name)
    for name, word in (("tiny:v2", "tiny:v1"), ("tinny", "tiny:v1"), ("TINY", "tiny:v1")):
        with pytest.raises(ModelNotFound) as caught:
            library.find(name)
        assert word in caught.value.hint
    library.own.create(ModelName.parse("bit"), model)
    with pytest.raises(ModelNotFound) as caught:
        library.find("gpt-4")  # which has its tag in common with "bit", and nothing else
    assert "did you mean" not in caught.value.hint


def test_a_broken_entry_does_not_hide_the_others(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library.at(tmp_path, ollama="", lm_studio="")
    library.own.create(ModelName.parse("good"), model)
    library.own.create(ModelName.parse("bad"), model)
    (tmp_path / "manifests" / "bad" / "@latest.json").write_text("{")
    assert [str(m.name) for m in library.models()] == ["good:latest"]
    assert "bad:latest is left out" in caplog.text


def test_where_the_store_is_by_default() -> None:
    assert default_root({"NEXUS_MODELS": "/m"}) == Path("/m")
    assert default_root({"XDG_DATA_HOME": "/d"}) == Path("/d/nexus/models")
