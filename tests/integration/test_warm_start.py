"""What a model uses most is remembered, read before the first request, and never in its way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext import Llama
from nexus_ext.errors import FormatError
from nexus_ext.runtime import popularity
from nexus_ext.runtime.popularity import MOST, Popularity, load, popularity_file, store
from nexus_ext.testing.synthetic import MoeDims, write_moe
from nexus_ext.types import Role
from tests.cli_support import call
from tests.integration.streaming import logits, prompt
from tests.integration.test_experts import assert_equal, cached, core_model, reference

KEY = "f" * 32


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of what is learned; the hardware is measured once for all tests."""
    directory = tmp_path / "cache"
    monkeypatch.setattr(popularity, "default_cache_dir", lambda *_: str(directory))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_moe(path, dims=MoeDims(n_experts=16, n_used=2))
    return path


def session(path: Path, slots: int = 6, **arguments: Any) -> Any:
    return cached(path, slots, **{"warm_start": True, **arguments})


def known(llm: Llama) -> Popularity:
    fingerprint = llm.nexus.catalog.fingerprint
    return load(popularity_file(fingerprint), fingerprint)


def test_an_nxf_says_what_is_popular_where_it_was_never_run(
    model: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with session(model) as llm:
        logits(llm, prompt(20, llm.n_vocab()))
        fingerprint = llm.nexus.catalog.fingerprint
    learned = popularity_file(fingerprint)
    for name, contents in (
        ("right", Path(learned).read_text()),
        ("other", Popularity(KEY, {}).to_json()),
        ("broken", "{"),
    ):
        (tmp_path / name).write_text(contents)
        nxf = tmp_path / f"{name}.nxf"
        section = f"popularity={tmp_path / name}"
        assert call("convert", model, nxf, "--section", section).status == 0
    Path(learned).unlink()
    with session(tmp_path / "right.nxf") as llm:
        warm = llm.nexus.warm_start
        assert warm is not None
        warm.wait()
        assert llm.nexus.stats().preloaded_bytes > 0
    assert not caplog.records
    for name in ("other", "broken"):
        Path(learned).unlink(missing_ok=True)
        with session(tmp_path / f"{name}.nxf") as llm:
            assert llm.nexus.stats().preloaded_bytes == 0
        assert f"{name}.nxf" in caplog.text


def test_the_second_session_starts_with_the_experts_of_the_first(
    model: Path, cache_dir: Path
) -> None:
    expected = reference(model)
    with session(model) as llm:
        core_model(llm).set_predictor("none")
        assert llm.nexus.stats().preloaded_bytes == 0
        assert_equal(llm, expected, "cold")
        cold = core_model(llm).stats()
        fingerprint = llm.nexus.catalog.fingerprint
        n_layers = len(llm.nexus.plan.expert_caches)
    found = load(popularity_file(fingerprint), fingerprint)
    assert len(found.counts) == n_layers
    with session(model) as llm:
        core_model(llm).set_predictor("none")
        llm.nexus.warm_start.wait()
        experts = [t for t in llm.nexus.catalog.tensors if t.role is Role.EXPERT]
        records = sum(6 * t.nbytes // t.n_experts for t in experts)
        assert llm.nexus.stats().preloaded_bytes == records, "every slot of every layer"
        assert_equal(llm, expected, "warm")
        warm = core_model(llm).stats()
    assert warm.expert_misses < cold.expert_misses
    after = load(popularity_file(fingerprint), fingerprint)
    for name, counts in found.counts.items():
        assert sum(after.counts[name]) == 2 * sum(counts), "sessions add up"
    assert len(list(cache_dir.glob("experts-*"))) == 1, "nothing temporary is left"


def test_a_request_does_not_wait_for_the_warm_start(model: Path, cache_dir: Path) -> None:
    expected = reference(model)
    for _ in range(4):  # from the second on, the first request races with preloading
        with session(model, 14) as llm:
            assert_equal(llm, expected, "at once")


def test_close_at_once_while_experts_are_read(model: Path, cache_dir: Path) -> None:
    with session(model, 14) as llm:
        logits(llm, prompt(20, llm.n_vocab()), 1)
    for _ in range(3):
        with session(model, 14):
            pass


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_it_can_be_declined(
    how: str, model: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("NEXUS_WARM_START", "0")
    with session(model, warm_start=False if how == "argument" else None) as llm:
        logits(llm, prompt(5, llm.n_vocab()), 1)
        assert llm.nexus.warm_start is None
    assert not list(cache_dir.glob("experts-*"))


@pytest.mark.parametrize("damage", ["text", "truncated", "number", "version", "other", "empty"])
def test_a_broken_file_is_ignored_with_a_warning_and_replaced(
    damage: str, model: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = reference(model)
    with session(model) as llm:
        logits(llm, prompt(5, llm.n_vocab()), 1)
        fingerprint = llm.nexus.catalog.fingerprint
    file = Path(popularity_file(fingerprint))
    good = file.read_text(encoding="utf-8")
    fields = json.loads(good)
    first = next(iter(fields["layers"]))
    file.write_bytes(
        {
            "text": b"\xff\xfe nothing",
            "truncated": good[: len(good) // 2].encode(),
            "number": json.dumps({**fields, "layers": {first: "AAA="}}).encode(),
            "version": json.dumps({**fields, "nexus_popularity": 99}).encode(),
            "other": json.dumps({**fields, "fingerprint": KEY}).encode(),
            "empty": b"",
        }[damage]
    )
    with caplog.at_level(logging.WARNING, "nexus_ext.runtime"), session(model) as llm:
        assert any("ignored" in r.message for r in caplog.records)
        assert llm.nexus.stats().preloaded_bytes == 0
        assert_equal(llm, expected, damage)
    assert load(str(file), fingerprint).counts


def test_a_directory_that_cannot_be_written_costs_a_warning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    directory = str(tmp_path / "file" / "cache")
    monkeypatch.setattr(popularity, "default_cache_dir", lambda *_: directory)
    with session(model) as llm:
        logits(llm, prompt(5, llm.n_vocab()), 1)
    assert any("not stored" in r.message for r in caplog.records)


def test_experts_that_cannot_be_read_ahead_fail_where_they_are_used(
    model: Path, cache_dir: Path
) -> None:
    expected = reference(model)
    with session(model) as llm:
        logits(llm, prompt(5, llm.n_vocab()), 1)
    with session(model) as llm:
        core_model(llm).inject("eio", count=20)
        llm.nexus.warm_start.wait()
        core_model(llm).clear_faults()
        assert_equal(llm, expected, "after failures that nobody saw")


# -- the file -------------------------------------------------------------------------------------

counts = st.dictionaries(
    st.text(min_size=1, max_size=20), st.lists(st.integers(0, MOST), max_size=40).map(tuple)
)


@given(counts)
def test_what_is_written_is_what_is_read(layers: dict[str, tuple[int, ...]]) -> None:
    value = Popularity(KEY, layers)
    assert Popularity.from_json(value.to_json(), source="x") == value


@given(st.text() | counts.map(lambda c: Popularity(KEY, c).to_json()), st.data())
def test_no_file_breaks_anything(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + data.draw(st.text(max_size=3)) + text[at + 1 :]
    try:
        found = Popularity.from_json(changed, source="x")
    except FormatError:
        return
    assert all(0 <= n <= MOST for c in found.counts.values() for n in c)


@given(counts, counts)
def test_counts_add_up_and_old_ones_fade(
    old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]
) -> None:
    merged = Popularity(KEY, old).plus(new)
    for name, of_layer in merged.counts.items():
        assert max(of_layer, default=0) <= MOST
        if name in new:
            assert len(of_layer) == len(new[name])
            order = np.argsort(new[name], kind="stable")
            if len(old.get(name, ())) != len(new[name]):
                assert list(np.array(of_layer)[order]) == sorted(of_layer)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "experts.json")
    assert store(file, Popularity(KEY, {"a": (1, 2)}))

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(popularity.os, "replace", refuse)
    assert not store(file, Popularity(KEY, {"a": (3, 4)}))
    assert load(file, KEY).counts == {"a": (1, 2)}
    assert [p.name for p in tmp_path.iterdir()] == ["experts.json"]
