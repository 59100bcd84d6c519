"""The verbs about models: what they show, what they change, and what they leave alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ext.cli.models import ago
from nexus_ext.cli.remote import bar, url_of
from nexus_ext.store import Library
from tests.cli_support import Done, call, hardware_file, run, with_template
from tests.fake_engine import FakeEngine
from tests.models_folder import find_model
from tests.server_support import MODEL, library_with, live


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test alone, and no configuration or store of the user's."""
    monkeypatch.setenv("NEXUS_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("NEXUS_MODELS_OLLAMA", "")
    monkeypatch.setenv("NEXUS_MODELS_LM_STUDIO", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("NEXUS_CONFIG", raising=False)
    return tmp_path / "store"


@pytest.fixture
def model() -> Path:
    return find_model("stories260K-q4_0.gguf")


def names() -> list[str]:
    return [entry["name"] for entry in call("list", "--json").json["models"]]


def good(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def test_a_model_gets_a_name_another_one_and_loses_both(model: Path) -> None:
    assert "nexus pull" in good(call("list")).err
    good(call("create", "tiny", "FROM", model))
    good(call("create", "tiny:two", model, "--system", "Be brief.", "-p", "top_k=3"))
    good(call("cp", "tiny:two", "copy"))
    assert names() == ["copy:latest", "tiny:latest", "tiny:two"]
    shown = call("show", "copy", "--json").json
    assert (shown["system"], shown["parameters"]) == ("Be brief.", {"top_k": 3})
    assert shown["architecture"] == "llama" and shown["path"] == str(model.resolve())
    table = good(call("list")).out
    for word in ("NAME", "ID", "SIZE", "MODIFIED", "tiny:two", "252.7 KiB", "just now", "nexus"):
        assert word in table
    assert "none" in good(call("show", "tiny")).out
    assert "removed" in good(call("rm", "tiny", "tiny:two", "copy")).out
    assert names() == [] and model.is_file()


def test_create_takes_from_a_name_what_it_is_not_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    good(call("create", "base", model, "--system", "S", "-p", "temperature=0.5"))
    good(
        call("create", "mine", "from", "base", "--template", tmp_path / "chat.jinja",
             "-p", "stop=A", "-p", "stop=B")
    )  # fmt: skip
    shown = call("show", "mine", "--json").json
    assert shown["parameters"] == {"temperature": 0.5, "stop": ["A", "B"]}
    assert (shown["system"], shown["template"]) == ("S", "{{ messages[0].content }}")


def test_a_name_goes_wherever_a_file_does(model: Path, tmp_path: Path) -> None:
    good(call("create", "mine", model))
    hardware = hardware_file(tmp_path)
    for command in (
        ["inspect", "mine", "--json"],
        ["plan", "mine", "--hardware", hardware, "--json"],
        ["export", "mine", tmp_path / "norms.safetensors", "--tensors", "norm", "--json"],
    ):
        force = ["--force"] if command[0] == "export" else []
        by_name = good(call(*command)).json
        assert by_name == good(call(command[0], model, *command[2:], *force)).json
        missing = call(command[0], "other", *command[2:])
        assert missing.status == 1 and "'other' is no file" in missing.out


def test_a_copied_model_is_freed_with_its_name(model: Path, store: Path) -> None:
    done = good(call("create", "own", model, "--copy", "--json"))
    assert done.json["path"].startswith(str(store))
    removed = call("rm", "own", "--json").json["removed"]
    assert removed == [{"name": "own:latest", "freed_bytes": model.stat().st_size}]


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["create", "../x", "MODEL"], 2, "no name"),
        (["create", "x", "FROM", "nope"], 1, "no file, and there is no model"),
        (["create", "x", "one", "two"], 2, "one source"),
        (["create", "x", "MODEL", "-p", "what=1"], 2, "what"),
        (["create", "x", "MODEL", "-p", "top_k"], 2, "no name with a value"),
        (["create", "x", "MODEL", "-p", "top_k=many"], 2, "many"),
        (["create", "x", "MODEL", "--template", "/none"], 2, "cannot be read"),
        (["create", "x", "/none.gguf"], 1, "none.gguf"),
        (["show", "nope"], 1, "nope:latest"),
        (["rm", "nope"], 1, "nope:latest"),
        (["cp", "nope", "x"], 1, "nope:latest"),
        (["run", "nope", "hi"], 1, "is no file"),
        (["pull", "nope"], 2, "USER/REPOSITORY"),
        (["list", "--config", "/none.toml"], 2, "cannot be read"),
        (["serve", "--config", "/none.toml"], 2, "cannot be read"),
        (["ps", "--host", "127.0.0.1:1"], 1, "nexus serve"),
        (["stop", "x", "--host", "ftp://x"], 2, "no http address"),
    ],
)
def test_mistakes_are_sentences(model: Path, arguments: list[str], status: int, word: str) -> None:
    done = call(*(str(model) if a == "MODEL" else a for a in arguments))
    assert done.status == status and word in done.err
    assert "Traceback" not in done.err


def test_run_takes_a_name_with_all_it_brings_along(model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    in_file = with_template(model, template, tmp_path / "with.gguf")
    (tmp_path / "t.jinja").write_text(template)
    good(
        call("create", "tale", model, "--template", tmp_path / "t.jinja", "--system", "Once upon",
             "-p", "temperature=0", "-p", "num_predict=6", "-p", "num_ctx=96")
    )  # fmt: skip
    by_name = good(run("run", "tale", "a time", "--json", "-c", "64")).out
    given = ("--temp", "0", "-n", "6", "--system", "Once upon")
    by_path = good(run("run", in_file, "a time", "--json", "-c", "64", *given)).out
    assert json.loads(by_name)["text"] == json.loads(by_path)["text"] != ""
    assert json.loads(by_name)["n_ctx"] == 64
    assert json.loads(good(run("run", "tale", "a time", "--json")).out)["n_ctx"] == 96
    longer = good(run("run", "tale", "a time", "--json", "-c", "64", "-n", "9")).out
    assert json.loads(longer)["accounting"]["tokens"] == 9


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine([MODEL])
    library: Library = library_with(tmp_path / "served", model)
    with live(engine, library) as server:
        yield engine, f"127.0.0.1:{server.port}"


def test_ps_shows_what_a_server_holds_and_stop_ends_it(
    server: tuple[FakeEngine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, host = server
    monkeypatch.setenv("NEXUS_HOST", host)
    assert "0 B of 4.0 KiB" in good(call("ps")).out
    engine.loaded.add(MODEL)
    shown = good(call("ps")).out
    for word in ("NAME", "SIZE", "RESIDENT", "TIER", "CONTEXT", "UNTIL", "60 % resident", MODEL,
                 "4096", "5 minutes", "640 B of 4.0 KiB", "[AAAAAA."):  # fmt: skip
        assert word in shown
    assert call("ps", "--json").json["models"][0]["name"] == MODEL
    good(call("stop", "tiny"))
    assert engine.loaded == set()
    assert "nope" in call("stop", "nope").err


def test_a_key_is_sent_to_a_server_that_asks_for_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_ext.server import Config
    from nexus_ext.server.config import ServerConfig

    library = library_with(tmp_path / "served", model)
    locked = Config(server=ServerConfig(api_keys=["k"]))
    with live(FakeEngine([MODEL]), library, locked) as server:
        refused = call("ps", "--host", server.url)
        assert refused.status == 1 and "NEXUS_API_KEY" in refused.err
        monkeypatch.setenv("NEXUS_API_KEY", "k")
        good(call("ps", "--host", server.url))


def test_the_bar_adds_up() -> None:
    models = [
        {"name": "a", "resident": 250, "kv": 0, "until_s": None},
        {"name": "b", "resident": 200, "kv": 50, "until_s": None},
    ]
    drawn = bar(models, 750, 1000)
    assert drawn.startswith("[" + "A" * 10 + "B" * 10 + "#" * 10 + "." * 10 + "]")
    assert "A a" in drawn and "B b" in drawn


def test_the_example_of_a_configuration_is_printed() -> None:
    from nexus_ext.server.config import example

    assert good(call("serve", "--example")).out == example()


def test_times_are_said_in_their_largest_unit() -> None:
    said = [ago(s) for s in (5, 60, 7200, 86400, 3 * 86400)]
    assert said == ["just now", "1 minute ago", "2 hours ago", "1 day ago", "3 days ago"]


@pytest.mark.parametrize(
    ("named", "url"),
    [
        ("box", "http://box:11435"),
        ("box:8080", "http://box:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("[::1]", "http://[::1]:11435"),
        ("https://box/", "https://box"),
        ("http://box:1/prefix", "http://box:1/prefix"),
    ],
)
def test_a_server_is_named_as_shortly_as_its_address_allows(named: str, url: str) -> None:
    assert url_of(named) == url


@pytest.mark.parametrize("named", ["box:99999", "box:x", "a box", "ftp://box", "http://"])
def test_what_is_no_address_of_a_server_is_wrong_usage(named: str) -> None:
    done = call("ps", "--host", named)
    assert done.status == 2 and "no http address" in done.err
