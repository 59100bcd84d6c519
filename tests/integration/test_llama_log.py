"""llama.cpp's log where several threads run models: errors by our logger, the rest not at all."""

from __future__ import annotations

import ctypes
import logging

import pytest
from llama_cpp import llama_cpp as bindings

from nexus_ext.runtime.llama_log import reasons_heard, silence_llama_log

WARN, ERROR = 3, 4  # of ggml's enumeration


def log(level: int, text: bytes) -> None:
    """Log as llama.cpp does: through the callback that is set."""
    callback, data = bindings.llama_log_callback(), ctypes.c_void_p()
    bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    callback(level, text, data)


@pytest.mark.parametrize("times", [1, 2])
def test_errors_are_warnings_of_ours_and_warnings_are_not_shown(
    times: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(times):
        silence_llama_log()
    with caplog.at_level(logging.DEBUG, "nexus_ext"):
        log(ERROR, b"init: something is wrong\n")
        log(WARN, b"decode: something is unusual\n")
        with reasons_heard() as reasons:  # an error of a load becomes the exception's text
            log(ERROR, b"llama_model_load: error loading model: odd\n")
    assert [record.getMessage() for record in caplog.records] == [
        "llama.cpp: init: something is wrong"
    ]
    assert reasons == ["odd"]
    assert capfd.readouterr() == ("", "")
