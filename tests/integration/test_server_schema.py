"""The API against its own description: schemathesis finds no 5xx and no schema violation.

A dozen made-up requests an endpoint by default; NEXUS_SCHEMA_EXAMPLES asks for more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from nexus_ext.server import Config
from nexus_ext.server.config import ServerConfig
from nexus_ext.server.endpoints import ENDPOINTS
from nexus_ext.server.http import Endpoint
from nexus_ext.server.openapi import description
from tests.fake_engine import FakeEngine
from tests.models_folder import find_model
from tests.server_support import MODEL, library_with, live

# Downloads ask another server.
ASKED = [endpoint for endpoint in ENDPOINTS if endpoint.path != "/api/pull"]
EXAMPLES = int(os.environ.get("NEXUS_SCHEMA_EXAMPLES", "12"))
# Whether a well-formed request can be served depends on the model: on its name, its tokens.
UNDECIDED = [positive_data_acceptance]
schema = schemathesis.openapi.from_dict(description(ENDPOINTS))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    library = library_with(tmp_path_factory.mktemp("store"), find_model("stories260K-q4_0.gguf"))
    engine = FakeEngine([MODEL])
    with live(engine, library, Config(server=ServerConfig(max_output_tokens=8))) as server:
        yield server.url
    assert engine.n_running == 0


@pytest.mark.parametrize("endpoint", ASKED, ids=lambda e: f"{e.method} {e.path}")
def test_whatever_is_sent_is_answered_as_described(endpoint: Endpoint, url: str) -> None:
    operation = schema[endpoint.path][endpoint.method]
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        # Names are made up; half of the requests get the one that there is.
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            if len(case.body["model"]) % 2 == 0:
                case.body["model"] = MODEL
        response = case.call_and_validate(base_url=url, excluded_checks=UNDECIDED)
        seen.add(response.status_code)

    ask()
    assert seen and max(seen) < 500


def test_every_endpoint_is_described_once() -> None:
    made = description(ENDPOINTS)
    described = [(path, method) for path, item in made["paths"].items() for method in item]
    assert sorted(described) == sorted((e.path, e.method.lower()) for e in ENDPOINTS)
    assert "$defs" not in str(made)
