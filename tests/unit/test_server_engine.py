"""What the multiplexer is told of a model, and how many bytes it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.server.config import Config
from nexus_ext.server.engine import budget_bytes, spec_of
from nexus_ext.store import ModelName, StoredModel
from nexus_ext.store.own import OwnStore
from tests.models_folder import find_model

TRAINED = 512


@pytest.fixture
def stored(tmp_path: Path) -> StoredModel:
    file = find_model("bitllama-3M-q8_0.gguf")
    return OwnStore(tmp_path).create(ModelName.parse("bit"), file)


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(("asked", "n_ctx"), [(4096, TRAINED), (100, 100), (0, TRAINED)])
def test_a_context_is_not_longer_than_the_model_was_trained_for(
    stored: StoredModel, asked: int, n_ctx: int
) -> None:
    assert spec_of(stored, config(engine={"n_ctx": asked})).n_ctx == n_ctx


def test_what_a_model_brings_along_counts_and_its_own_section_more(
    stored: StoredModel, tmp_path: Path
) -> None:
    own = OwnStore(tmp_path)
    made = own.create(ModelName.parse("bit"), stored.path, parameters={"num_ctx": 77})
    assert spec_of(made, config()).n_ctx == 77
    section = {"n_ctx": 600, "pinned": True, "share": "1M", "priority": 2, "keep_alive_s": -1}
    for name in ("bit", "bit:latest"):
        spec = spec_of(made, config(model={name: section}))
        assert (spec.n_ctx, spec.pinned, spec.share_bytes) == (600, True, 1 << 20)
        assert (spec.priority, spec.keep_alive_s, spec.name) == (2, -1, "bit:latest")
    assert not spec_of(made, config(model={"bit:other": section})).pinned


def test_the_budget_is_what_is_given_or_most_of_what_is_free() -> None:
    assert budget_bytes(config(engine={"budget": "3M"})) == 3 << 20
    given = budget_bytes(config(engine={"ram": "1G"}))
    assert 0.8 * (1 << 30) < given < 1 << 30
    assert budget_bytes(config()) > 0
    with pytest.raises(UsageError, match="both"):
        budget_bytes(config(engine={"ram": "1G", "budget": "1G"}))
    with pytest.raises(UsageError, match="less than the process"):
        budget_bytes(config(engine={"ram": "1M"}))
