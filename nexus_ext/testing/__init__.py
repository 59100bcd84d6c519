"""For authors of plugins: run hooks without a model, models without weights, traces without both.

`FakeEngine` asks a plugin what the runtime would ask it. `assert_same_tokens` runs a model with
the plugin and compares every logit with those of the unmodified llama.cpp. Installing nexus_ext
also gives pytest fixtures (`nexus_ext.testing.pytest_plugin`). Everything here is public; names are
imported when they are first used, and none of them needs pytest.

See plugins/docs/tutorial.md for a complete plugin with its tests.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_ext.testing.codec import CodecReport as CodecReport
    from nexus_ext.testing.codec import check_codec as check_codec
    from nexus_ext.testing.engine import CacheRun as CacheRun
    from nexus_ext.testing.engine import CommandResult as CommandResult
    from nexus_ext.testing.engine import FakeEngine as FakeEngine
    from nexus_ext.testing.engine import FakeModel as FakeModel
    from nexus_ext.testing.engine import PredictorRun as PredictorRun
    from nexus_ext.testing.engine import assert_healthy as assert_healthy
    from nexus_ext.testing.engine import replay_trace as replay_trace
    from nexus_ext.testing.hardware import machine as machine
    from nexus_ext.testing.identity import SameTokens as SameTokens
    from nexus_ext.testing.identity import assert_same_tokens as assert_same_tokens
    from nexus_ext.testing.loading import load_plugins as load_plugins
    from nexus_ext.testing.loading import use_plugins as use_plugins
    from nexus_ext.testing.plans import expert_plan as expert_plan
    from nexus_ext.testing.server import scripted_server as scripted_server
    from nexus_ext.testing.synthetic import LlamaDims as LlamaDims
    from nexus_ext.testing.synthetic import MoeDims as MoeDims
    from nexus_ext.testing.synthetic import write_gguf as write_gguf
    from nexus_ext.testing.synthetic import write_llama as write_llama
    from nexus_ext.testing.synthetic import write_moe as write_moe
    from nexus_ext.testing.traces import RECORDED as RECORDED
    from nexus_ext.testing.traces import recorded_trace as recorded_trace
    from nexus_ext.testing.traces import synthetic_trace as synthetic_trace

_HOME = {
    "CacheRun": "engine",
    "CodecReport": "codec",
    "CommandResult": "engine",
    "FakeEngine": "engine",
    "FakeModel": "engine",
    "LlamaDims": "synthetic",
    "MoeDims": "synthetic",
    "PredictorRun": "engine",
    "RECORDED": "traces",
    "SameTokens": "identity",
    "assert_healthy": "engine",
    "assert_same_tokens": "identity",
    "check_codec": "codec",
    "expert_plan": "plans",
    "load_plugins": "loading",
    "machine": "hardware",
    "recorded_trace": "traces",
    "replay_trace": "engine",
    "scripted_server": "server",
    "synthetic_trace": "traces",
    "use_plugins": "loading",
    "write_gguf": "synthetic",
    "write_llama": "synthetic",
    "write_moe": "synthetic",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
