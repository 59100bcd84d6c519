"""The parts of the multiplexer that compute nothing: turns, text, prefixes, saved states."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.multiplexer.events import EventLog
from nexus_ext.multiplexer.fairness import FairClock
from nexus_ext.multiplexer.prefix import TILE, chunk_end, prefilled, reusable, shared_chunk
from nexus_ext.multiplexer.sessions import Saved, SessionStore, common_prefix
from nexus_ext.multiplexer.settings import ModelSpec, Settings
from nexus_ext.multiplexer.text import TextStream

# -- turns -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=4))
def test_models_share_the_time_and_not_the_turns(costs: list[int]) -> None:
    clock, used = FairClock(), dict.fromkeys("abcd"[: len(costs)], 0)
    for _ in range(2000):
        name = clock.pick(used)
        assert name is not None
        cost = costs["abcd".index(name)]
        clock.charge(name, cost)
        used[name] += cost
    assert max(used.values()) - min(used.values()) <= 2 * max(costs)


def test_who_was_idle_saves_up_no_turns() -> None:
    clock = FairClock()
    for _ in range(100):
        assert clock.pick(["a"]) == "a"
        clock.charge("a", 1000)
    turns = []
    for _ in range(10):
        name = clock.pick(["a", "b"])
        assert name is not None
        clock.charge(name, 1000)
        turns.append(name)
    assert turns.count("a") == 5


def test_weight_buys_time() -> None:
    clock, used = FairClock(), {"a": 0, "b": 0}
    for _ in range(900):
        name = clock.pick(used)
        assert name is not None
        clock.charge(name, 10, 2.0 if name == "a" else 1.0)
        used[name] += 10
    assert 1.9 < used["a"] / used["b"] < 2.1


def test_nobody_waiting_is_nobodys_turn() -> None:
    assert FairClock().pick([]) is None


# -- text ------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.lists(st.integers(1, 5), max_size=60))
def test_pieces_of_any_size_give_the_text_and_whole_characters(text: str, sizes: list[int]) -> None:
    raw, stream, shown = text.encode("utf-8", "surrogatepass"), TextStream(), []
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    at = 0
    for size in [*sizes, len(raw) + 1]:
        part = stream.add(raw[at : at + size])
        part.encode()  # no half of a character
        shown.append(part)
        at += size
    assert "".join(shown) + stream.finish() == text


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=40, max_size=40),
)
def test_stop_texts_never_show_however_the_pieces_fall(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    stream, shown, at = TextStream(stops), "", 0
    for size in sizes:
        shown += stream.add(text[at : at + size].encode())
        at += size
    shown += stream.finish()
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if stream.stopped_by is None:
        assert shown == text and not any(stop in text for stop in stops)
    else:
        assert text[len(shown) :].startswith(stream.stopped_by)
        assert stream.add(b"more") == ""


def test_broken_utf8_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.add("€".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"


# -- prefixes --------------------------------------------------------------------------------------


def _chunks(begin: int, n_prompt: int, n_ubatch: int) -> list[tuple[int, int]]:
    found = []
    while begin < n_prompt:
        end = chunk_end(begin, n_prompt, n_ubatch)
        found.append((begin, end))
        begin = end
    return found


def _kinds(begin: int, n_prompt: int, n_ubatch: int) -> list[int]:
    """How each token from `begin` on is computed: alone, in a part of a tile, in a tile or more."""
    return [
        min(end - at, 2) if end - at < TILE else 3
        for at, end in _chunks(begin, n_prompt, n_ubatch)
        for _ in range(end - at)
    ]


@given(st.integers(1, 130), st.integers(0, 140), st.integers(0, 140), st.integers(16, 40))
def test_what_is_reused_leaves_the_rest_as_a_fresh_run_computes_it(
    n_prompt: int, n_common: int, n_prefilled: int, n_ubatch: int
) -> None:
    n_prefilled = min(n_prefilled, n_common)
    n = reusable(n_prompt, n_common, n_prefilled, n_ubatch, session=False)
    fresh = _kinds(0, n_prompt, n_ubatch)
    assert 0 <= n < n_prompt and n <= n_prefilled
    assert fresh[:n] == [3] * n  # which is how what counts as prefilled was computed
    assert fresh[n:] == _kinds(n, n_prompt, n_ubatch)
    assert n > min(n_prefilled, n_prompt - 1) - TILE  # little is given up


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(16, 40))
def test_prompts_share_a_pass_and_each_is_computed_as_if_alone(
    lengths: list[int], n_ubatch: int
) -> None:
    lengths = [min(length, n_ubatch) for length in lengths]
    together, n = shared_chunk(lengths, n_ubatch)
    assert together[0] == 0 and len(together) * n <= n_ubatch
    if len(together) == 1 and n == lengths[0]:
        return
    for i in together:
        assert TILE <= n <= lengths[i]
        assert lengths[i] == n or lengths[i] - n >= TILE


def test_equal_prompts_are_one_pass() -> None:
    assert shared_chunk([9, 9, 9], 64) == ([0, 1, 2], 9)
    assert shared_chunk([20, 9, 12], 64) == ([0, 1], 9)  # the third would have three left
    assert shared_chunk([1, 9], 64) == ([0], 1)


def test_a_session_goes_on_where_it_was() -> None:
    assert reusable(30, 25, 10, 8, session=True) == 25
    assert reusable(25, 25, 10, 8, session=True) == 24


def test_states_count_as_prefilled_while_they_are_a_fresh_runs() -> None:
    assert prefilled(18, 10, 10) == 18
    assert prefilled(17, 10, 10) == 10  # less than a tile
    assert prefilled(30, 10, 20) == 10  # after generated ones


# -- saved states ----------------------------------------------------------------------------------


def _saved(tokens: range, *, n: int = 100, session: str | None = None, key: str = "m") -> Saved:
    return Saved(
        key, tuple(tokens), len(tokens), session, n, bytearray(tokens[0] for _ in range(n))
    )


def test_states_go_from_memory_to_disk_to_nothing(tmp_path: Path) -> None:
    store = SessionStore(250, 150, tmp_path)
    for i in range(4):
        store.put(_saved(range(100 * i % 256, 100 * i % 256 + 20)))
        assert store.used_ram_bytes <= 250 and store.used_disk_bytes <= 150
    assert len(store) == 3  # two in memory, one on disk
    oldest = store.best("m", range(100, 120), None)
    assert oldest is not None and oldest.data is None
    assert store.take(oldest) == bytearray([100] * 100)
    assert len(store) == 2
    store.close()
    assert not list(tmp_path.iterdir())


def test_without_a_disk_the_oldest_are_forgotten() -> None:
    store = SessionStore(250)
    for i in range(4):
        store.put(_saved(range(30 * i, 30 * i + 20)))
    assert len(store) == 2 and store.best("m", range(20), None) is None


def test_the_longest_prefix_is_found_and_the_own_session_first() -> None:
    store = SessionStore(1000)
    store.put(_saved(range(30), session="a"))
    store.put(Saved("m", tuple(range(40)) + (7,) * 5, 45, "b", 10, bytearray(10)))
    found = store.best("m", range(60), None)
    assert found is not None and found.session == "b"
    found = store.best("m", range(60), "a")
    assert found is not None and found.session == "a"
    assert store.best("other", range(60), "a") is None
    assert store.best("m", [5, 6, 7], None) is None


def test_a_longer_state_replaces_its_own_beginning() -> None:
    store = SessionStore(1000)
    store.put(_saved(range(20)))
    store.put(_saved(range(30)))
    assert len(store) == 1


def test_a_state_whose_file_is_gone_is_no_state(tmp_path: Path) -> None:
    store = SessionStore(10, 1000, tmp_path)
    store.put(_saved(range(20)))
    saved = store.best("m", range(20), None)
    assert saved is not None and saved.file is not None
    saved.file.write_bytes(b"short")
    assert store.take(saved) is None and len(store) == 0


def test_memory_holds_no_more_while_a_state_is_on_its_way(tmp_path: Path) -> None:
    store = SessionStore(250, 1000, tmp_path)
    states = [_saved(range(30 * i, 30 * i + 20)) for i in range(3)]
    for saved in states:
        store.reserve(saved.nbytes)
        assert store.used_ram_bytes + saved.nbytes <= 250
        store.put(saved)
    assert store.used_ram_bytes == 200 and store.used_disk_bytes == 100
    first = store.take(states[0])  # it comes from the disk: another one goes there for it
    assert first == bytearray(100) and store.used_ram_bytes + 100 <= 250
    assert store.take(states[0]) is None, "it was taken"
    small = SessionStore(100)
    small.put(states[1])
    small.reserve(100)
    assert small.take(states[1]) is None, "it was forgotten to make room"
    small.close()
    store.close()
    assert not list(tmp_path.iterdir())


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0


# -- settings and events ---------------------------------------------------------------------------


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in ({"budget_bytes": 0}, {"n_parallel": 0}, {"n_ubatch": 8}, {"max_queue": 0}):
        with pytest.raises(UsageError):
            Settings(**{"budget_bytes": 1 << 30, **wrong})
    with pytest.raises(UsageError, match="no directory"):
        Settings(budget_bytes=1 << 30, session_directory=tmp_path / "none")
    with pytest.raises(UsageError, match="share_bytes"):
        ModelSpec("m", "m.gguf", share_bytes=-1)
    with pytest.raises(UsageError):
        Settings.budget_of_ram(1 << 20)
    assert 0 < Settings.budget_of_ram(1 << 30) < 1 << 30


def test_events_are_kept_told_and_readable() -> None:
    log, heard = EventLog(keep=2), []
    log.listen(heard.append)
    for i in range(3):
        log.add("evict", f"m{i}", "1 units for x", nbytes=3 << 20, ns=1_500_000)
    assert [event.model for event in log.events()] == ["m1", "m2"]
    assert len(heard) == 3
    assert "m0" in str(heard[0]) and "3.0 MiB" in str(heard[0]) and "1,500 us" in str(heard[0])
