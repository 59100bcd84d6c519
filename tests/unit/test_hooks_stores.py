"""Stores of plugins add names and take none away; what is told later is told in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ext import hookimpl
from nexus_ext.errors import FormatError, ModelNotFound
from nexus_ext.plugins import Plugins
from nexus_ext.plugins.background import Background
from nexus_ext.store import Library, ModelName, StoredModel
from nexus_ext.testing import load_plugins
from tests.unit.hook_exercises import STORIES

MINE = ModelName(("mine",), "latest")
THEIRS = ModelName(("theirs",), "latest")


class Store:
    """A store with one model, or with what a test wants."""

    def __init__(
        self, name: str, *models: ModelName, finds: Callable[[], Any] | None = None
    ) -> None:
        self.name = name
        self.models = models
        self.finds = finds

    @hookimpl
    def nexus_model_store(self) -> Store:
        return self

    def find(self, name: ModelName) -> Any:
        if self.finds is not None:
            return self.finds()
        return stored(name) if name in self.models else None

    def names(self) -> list[ModelName]:
        return list(self.models)


def stored(name: ModelName) -> StoredModel:
    return StoredModel(name, str(STORIES), 1, 0.0, "0" * 64, "somewhere")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    def load(*plugins: object) -> Plugins:
        found = load_plugins(*plugins)
        monkeypatch.setattr("nexus_ext.plugins._plugins", found)
        return found

    return load


@pytest.fixture
def library(tmp_path: Path) -> Callable[[], Library]:
    def opened() -> Library:
        made = Library.at(tmp_path / "own", ollama="", lm_studio="")
        if made.own.find(MINE) is None:
            made.own.create(MINE, STORIES)
        return made

    return opened


def test_a_store_adds_names_and_shadows_none(
    use: Callable[..., Plugins], library: Callable[[], Library]
) -> None:
    use(Store("shelf", MINE, THEIRS))
    found = library()
    assert found.names() == [MINE, THEIRS]
    assert found.find("mine").origin == "nexus"
    assert found.find("theirs").origin == "shelf"
    assert [model.origin for model in found.models()] == ["nexus", "shelf"]


@pytest.mark.parametrize("name", ["nexus", "ollama", "not a name", "", "UPPER"])
def test_a_store_cannot_have_the_name_of_another_or_none(
    name: str, use: Callable[..., Plugins], library: Callable[[], Library]
) -> None:
    plugins = use(Store(name, THEIRS))
    assert library().names() == [MINE]
    (record,) = (r for r in plugins.list_plugins() if not r.builtin)
    assert record.disabled == ("nexus_model_store",)


@pytest.mark.parametrize(
    ("finds", "why"),
    [
        (lambda: 7, "which is no stored model"),
        (lambda: stored(MINE), "which is no stored model"),
        (lambda: replace(stored(THEIRS), path="/nowhere"), "where there is no file"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_store_that_answers_nonsense_has_no_models_any_more(
    finds: Callable[[], Any],
    why: str,
    use: Callable[..., Plugins],
    library: Callable[[], Library],
) -> None:
    plugins = use(Store("shelf", THEIRS, finds=finds))
    found = library()
    with pytest.raises(ModelNotFound):
        found.find("theirs")
    (record,) = (r for r in plugins.list_plugins() if not r.builtin)
    assert why in record.error
    assert found.names() == [MINE] == library().names()


def test_a_broken_entry_is_its_users_to_know(
    use: Callable[..., Plugins], library: Callable[[], Library]
) -> None:
    def broken() -> None:
        raise FormatError("the entry is broken")

    plugins = use(Store("shelf", THEIRS, finds=broken))
    with pytest.raises(FormatError, match="the entry is broken"):
        library().find("theirs")
    assert library().find("mine").origin == "nexus"
    (record,) = (r for r in plugins.list_plugins() if not r.builtin)
    assert record.state == "active"


def test_what_is_told_later_keeps_its_order() -> None:
    background, told = Background(), []
    for n in range(50):
        background.add(lambda n=n: told.append(n))
    assert background.wait(10)
    assert told == list(range(50))


def test_a_listener_that_falls_behind_loses_events_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background, free, told = Background(most=2), threading.Event(), []
    started = threading.Event()

    def slow() -> None:
        started.set()
        free.wait(10)

    background.add(slow)
    assert started.wait(10)
    for n in range(5):
        background.add(lambda n=n: told.append(n))
    assert background.dropped == 3
    assert caplog.text.count("plugins fall behind") == 1
    assert not background.wait(0.01)
    free.set()
    assert background.wait(10)
    assert told == [0, 1]


def test_what_raises_there_is_logged_and_the_next_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background, told = Background(), []
    background.add(lambda: told.append(1 // 0))
    background.add(lambda: told.append(1))
    assert background.wait(10)
    assert told == [1] and "ZeroDivisionError" in caplog.text
