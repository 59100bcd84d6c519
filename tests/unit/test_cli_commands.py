"""The commands that load no model: what they show, write and refuse."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from nexus_ext.cli.options import DEFAULT_CTX
from nexus_ext.formats import open_gguf
from nexus_ext.hardware import HardwareProfile
from nexus_ext.placement import Plan
from nexus_ext.testing.synthetic import write_llama, write_moe, write_preset
from nexus_ext.units import parse_bytes
from tests.cli_support import COMMAND, Done, call, hardware_file, run
from tests.models_folder import find_model


@pytest.fixture(scope="module")
def model() -> Path:
    return find_model("bitllama-3M-q8_0.gguf")


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hardware_file(tmp_path_factory.mktemp("hardware"))


def plan(model: Path, hardware: Path, *arguments: str) -> Done:
    return call("plan", model, "--hardware", hardware, *arguments)


def test_inspect_adds_up(model: Path) -> None:
    fields = call("inspect", model, "--json").json
    catalog = open_gguf(model)
    assert fields["weights_bytes"] == catalog.nbytes
    assert fields["shape"]["architecture"] == "bitnet"
    for groups in ("roles", "types"):
        assert sum(group["bytes"] for group in fields[groups].values()) == catalog.nbytes
        assert sum(group["tensors"] for group in fields[groups].values()) == len(catalog.tensors)
    assert "tensors" not in fields and "metadata" not in fields


def test_inspect_lists_tensors_and_metadata_when_asked(model: Path) -> None:
    fields = call("inspect", model, "--json", "--tensors", "--metadata").json
    assert [t["name"] for t in fields["tensors"]] == [t.name for t in open_gguf(model).tensors]
    assert fields["metadata"]["general.architecture"] == "bitnet"
    assert fields["metadata"]["tokenizer.ggml.tokens"] == {"element": "string", "length": 512}
    shown = call("inspect", model, "--tensors", "--metadata").out
    assert "blk.0.attn_q.weight" in shown and "general.architecture" in shown


def test_inspect_shows_experts(tmp_path: Path) -> None:
    write_moe(tmp_path / "moe.gguf")
    done = call("inspect", tmp_path / "moe.gguf")
    assert "8, 2 a token" in done.out and "router" in done.out


def test_inspect_reads_only_the_header_of_a_huge_model(tmp_path: Path) -> None:
    (path,) = write_preset(tmp_path / "huge.gguf", "llama-70b", sparse=True)
    fields = call("inspect", path, "--json").json
    assert fields["weights_bytes"] > 30 << 30
    # Holes: nothing of the weights is on the disk, so nothing of them can have been read.
    assert path.stat().st_blocks * 512 < 64 << 20


def test_inspect_reads_a_split_model_by_any_part(tmp_path: Path) -> None:
    dims = {"n_layers": 2, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 300}
    paths = write_llama(tmp_path / "m.gguf", split=3, **dims)
    assert call("inspect", paths[1], "--json").json["files"][2]["path"] == str(paths[2])


def test_inspect_keeps_control_characters_off_the_terminal(tmp_path: Path, model: Path) -> None:
    data = model.read_bytes().replace(b"bitllama-3M", b"bitll\x1b]0;\x07M", 1)
    assert data != model.read_bytes()
    (tmp_path / "evil.gguf").write_bytes(data)
    done = call("inspect", tmp_path / "evil.gguf", "--metadata")
    assert done.status == 0 and "\x1b" not in done.out


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_file_that_is_no_model_is_one_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model at all, but long enough to look at")
    done = call(command, tmp_path / "m.gguf")
    assert done.status == 1
    assert "m.gguf" in done.err and "Traceback" not in done.err
    done = call(command, tmp_path / "m.gguf", "--json")
    assert done.status == 1 and done.json["error"]["code"] == "format"


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    error = call("inspect", tmp_path / "none.gguf", "--json").json["error"]
    assert error["code"] == "read_failed" and error["errno"] == 2
    assert error["path"] == str(tmp_path / "none.gguf")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = call("inspect", tmp_path / "none.gguf", "--debug")
    assert "Traceback" in done.err and done.status == 1


def test_a_plan_accounts_for_every_byte(model: Path, hardware: Path) -> None:
    done = plan(model, hardware, "--weights", "600K", "--json")
    made = Plan.from_json(done.out)
    assert made.weights_bytes <= 600 << 10
    assert made.streamed_bytes_per_token > 0
    assert made.fingerprint == open_gguf(model).fingerprint
    ram = plan(model, hardware, "--ram", "300M", "--json").json
    assert sum(ram["breakdown"].values()) == 300 << 20


def test_a_plan_is_told_in_tables(model: Path, hardware: Path) -> None:
    done = plan(model, hardware, "--weights", "600K")
    assert done.status == 0
    for word in ("Memory", "ring", "KV cache", "budget", "Weights", "nvme", "predicted", "bound"):
        assert word in done.out
    (ring,) = (line for line in done.out.splitlines() if line.startswith("ring "))
    made = Plan.from_json(plan(model, hardware, "--weights", "600K", "--json").out)
    assert abs(parse_bytes(" ".join(ring.split()[1:3])) - made.ring_bytes) < 100


def test_a_plan_that_streams_nothing_says_so(model: Path, hardware: Path) -> None:
    done = plan(model, hardware)
    assert "Everything fits" in done.out and "bound" not in done.out
    assert plan(model, hardware, "--json").json["prediction"]["bound_tok_s"] is None


def test_a_plan_can_be_written_to_a_file(model: Path, hardware: Path, tmp_path: Path) -> None:
    done = plan(model, hardware, "--weights", "600K", "-o", str(tmp_path / "plan.json"))
    assert "--plan" in done.err
    written = Plan.from_json((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written == Plan.from_json(plan(model, hardware, "--weights", "600K", "--json").out)
    done = plan(model, hardware, "-o", str(tmp_path / "no" / "plan.json"))
    assert done.status == 2 and "No such file" in done.err


@pytest.mark.parametrize(
    "options", [("--ram", "1G"), ("--weights", "1M"), ("--pin", "ffn=ram"), ("--io", "direct")]
)
@pytest.mark.parametrize("command", ["run", "verify", "bench", "exec"])
def test_nothing_is_said_beside_a_plan_that_it_would_not_change(
    model: Path, command: str, options: tuple[str, str]
) -> None:
    rest = ("--", "true", "-m", model) if command == "exec" else (model,)
    done = call(command, "--plan", "plan.json", *options, *rest)
    assert done.status == 2 and options[0] in done.err and "--plan" in done.err


def test_a_plan_from_a_file_has_no_room_for_a_longer_context(
    model: Path, hardware: Path, tmp_path: Path
) -> None:
    small = ("-c", "64", "-ub", "16")
    least = plan(model, hardware, "--ram", "1", *small)
    ram = next(word for word in least.err.split() if word.isdigit() and len(word) > 4)
    file = tmp_path / "plan.json"
    assert plan(model, hardware, "--ram", ram, *small, "-o", str(file)).status == 0
    shared = ("run", model, "Once", "--hardware", hardware, "--plan", file, "-n", "1")
    done = call(*shared, "-c", "4096", "-ub", "16")
    assert done.status == 3 and "4096 tokens" in done.err and str(file) in done.err
    assert call(*shared, *small).status == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_of_sampling_are_finite(model: Path, value: str) -> None:
    done = call("run", model, "Once", "--temp", value)
    assert done.status == 2 and "--temp" in done.err


def test_what_does_not_fit_is_status_3_with_the_smallest_budget(
    model: Path, hardware: Path
) -> None:
    done = plan(model, hardware, "--weights", "1K", "--json")
    assert done.status == 3
    error = done.json["error"]
    assert error["code"] == "does_not_fit"
    smallest = str(error["smallest_bytes"])
    assert smallest in error["hint"]
    assert plan(model, hardware, "--weights", smallest, "--json").status == 0
    assert plan(model, hardware, "--weights", str(int(smallest) - 1)).status == 3


def test_pins_are_obeyed(model: Path, hardware: Path) -> None:
    pins = ("--pin", "ffn_down=ram", "--pin", r"blk\.0\.attn_(q|k)\.=nvme")
    tiers = plan(model, hardware, "--weights", "1500K", *pins, "--json").json["tiers"]
    assert tiers["blk.1.ffn_down.weight"] == "ram"
    assert tiers["blk.0.attn_q.weight"] == "nvme"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ram", "4X"), "--ram is '4X'"),
        (("--pin", "ffn"), "--pin is 'ffn'"),
        (("--pin", "ffn=disk"), "tiers are gpu, ram, nvme, host"),
        (("--pin", "(=ram"), "regular expression is wrong"),
        (("--kv-type-v", "q9"), "q9"),
        (("--kv-type-v", "q8_0"), "flash attention"),
        (("--io", "fast"), "fast"),
        (("--hardware", "no-such-machine"), "no-such-machine"),
    ],
)
def test_wrong_values_are_status_2_and_named(
    model: Path, hardware: Path, arguments: tuple[str, str], words: str
) -> None:
    done = plan(model, hardware, *arguments)
    assert done.status == 2, done.err
    assert words in done.err


def test_the_context_is_a_usual_one_or_as_trained(model: Path, hardware: Path) -> None:
    def kv(*arguments: str) -> int:
        return int(plan(model, hardware, *arguments, "--json").json["breakdown"]["KV cache"])

    assert open_gguf(model).shape.n_ctx_train < DEFAULT_CTX
    assert kv() == kv("--ctx", "0") == kv("-c", "512")
    assert kv("--ctx-size", "2048") > 3.9 * kv()
    quantized = ("--ctx", "2048", "-ctk", "q8_0", "-ctv", "q8_0", "-fa")
    assert kv(*quantized) < kv("--ctx", "2048")


def test_probe_measures_once_and_writes_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "file"
    target.write_bytes(os.urandom(1 << 20) * 80)
    done = call("probe", target, "--seconds", "0.2", "-o", tmp_path / "profile.json", "--json")
    assert done.status == 0, done.err
    written = (tmp_path / "profile.json").read_text(encoding="utf-8")
    profile = HardwareProfile.from_json(written)
    assert profile == HardwareProfile.from_json(done.out)
    again = call("probe", target)
    assert "measuring" not in again.err and profile.cpu.name in again.out
    refreshed = call("probe", target, "--seconds", "0.2", "--refresh")
    assert "measuring" in refreshed.err and "sequential" in refreshed.out


def test_probe_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert call("probe", tmp_path / "none").status == 2


def test_a_trace_of_plugins_is_written_once() -> None:
    done = run("plugins", "--json", environment={"NEXUS_TRACE_PLUGINS": "1"})
    lines = [line for line in done.err.splitlines() if "registered nexus_ext.policies.io" in line]
    assert lines == ["nexus plugins: registered nexus_ext.policies.io: nexus_io_policy"]


def test_plugins_lists_the_built_in_ones() -> None:
    records = call("plugins", "--json").json["plugins"]
    decided = {hook for record in records for hook in record["decides"]}
    assert {"nexus_placement_solver", "nexus_io_policy"} <= decided
    assert "nexus_ext.policies.io" in call("plugins").out


def test_a_pipe_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    (path,) = write_preset(tmp_path / "big.gguf", "llama-70b", sparse=True)
    command = [*COMMAND, "inspect", str(path), "--tensors"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""


def test_json_of_every_command_is_one_document(model: Path, hardware: Path) -> None:
    for arguments in (("inspect", model), ("plan", model, "--hardware", hardware), ("plugins",)):
        done = call(*arguments, "--json")
        assert isinstance(json.loads(done.out), dict) and not done.err
