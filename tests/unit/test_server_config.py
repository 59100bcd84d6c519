"""The configuration: the documented example, and what overrides what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.server.config import Config, EngineConfig, ModelConfig, example, load_config

NOTHING: dict[str, str] = {"XDG_CONFIG_HOME": "/nowhere"}


def test_the_example_says_the_defaults_and_every_key(tmp_path: Path) -> None:
    (tmp_path / "nexus.toml").write_text(example())
    config = load_config(tmp_path / "nexus.toml", environment=NOTHING)
    assert config.model_copy(update={"model": {}}) == Config()
    assert config.model["qwen3:8b"] == ModelConfig(
        n_ctx=16384,
        n_parallel=2,
        kv_type="q8_0",
        kernels="ggml",
        keep_alive_s=-1,
        gpu=0,
        share=1 << 30,
    )
    for section, model in Config.model_fields.items():
        if section != "model":
            names = set(type(model.get_default()).model_fields)
            text = example().split(f"[{section}]")[1].split("\n[")[0]
            assert set(re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE)) == names


def test_what_is_commented_out_in_the_example_would_be_valid(tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", example(), flags=re.MULTILINE)
    (tmp_path / "nexus.toml").write_text(text)
    config = load_config(tmp_path / "nexus.toml", environment=NOTHING)
    assert config.engine.ram == 8 << 30 and config.models.store == "/models/nexus"


def test_flags_override_the_environment_and_that_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[server]\nport = 1\nhost = "::1"\nmax_requests = 7\n[engine]\nram = "2G"\n')
    environment = {
        **NOTHING,
        "NEXUS_CONFIG": str(file),
        "NEXUS_SERVER_PORT": "2",
        "NEXUS_SERVER_MAX_REQUESTS": "8",
        "NEXUS_SERVER_API_KEYS": "a, b",
        "NEXUS_ENGINE_TRACE": "true",
    }
    flags = {"server": {"port": 3, "host": None}}
    config = load_config(flags=flags, environment=environment)
    assert (config.server.port, config.server.max_requests) == (3, 8)
    assert (config.server.host, config.server.api_keys) == ("::1", ["a", "b"])
    assert config.engine == EngineConfig(ram=2 << 30, trace=True)


def test_a_variable_without_a_key_is_told(caplog: pytest.LogCaptureFixture) -> None:
    environment = {**NOTHING, "NEXUS_SERVER_PROT": "1", "NEXUS_MODELS": "/x", "NEXUS_HOST": "y"}
    assert load_config(environment=environment) == Config()
    assert [r.getMessage() for r in caplog.records] == [
        "NEXUS_SERVER_PROT is set, but [server] has no key prot"
    ]


def test_without_a_file_the_defaults_hold() -> None:
    assert load_config(environment=NOTHING) == Config()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[server]\nport = 70000", "server.port = 70000"),
        ("[server]\nprot = 1", "server.prot, a key that does not exist; did you mean port?"),
        ("[servers]", "servers, a key that does not exist; did you mean server?"),
        ("[engine]\nctx = 4096", "engine.ctx, a key that does not exist; did you mean n_ctx?"),
        ("[model.x]\npined = true", "did you mean pinned?"),
        ("[engine]\nzzz = 1", "engine.zzz, a key that does not exist"),
        ('[engine]\nram = "lots"', "lots"),
        ('server = "x"', "server"),
        ("[server", "no TOML"),
        ("[model.x]\npriority = -1", "model.x.priority"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(word)):
        load_config(tmp_path / "c.toml", environment=NOTHING)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "none.toml", environment=NOTHING)
