"""Workers are told what to do in JSON, and what befalls them comes back as the right error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from nexus_ext.errors import DoesNotFit, FormatError, NexusError, ReadFailed
from nexus_ext.runtime import worker
from nexus_ext.runtime.memory_limit import MemoryGroup, Usage
from nexus_ext.runtime.worker import Job, Session, WorkerDied, job_of, run_worker

SESSION = Session(256, 256, 64, 2, False, "f16", "q8_0", 0)
JOB = Job("/m.gguf", "paged", SESSION, None, 4, 2, plan="{}", hardware="{}", tokens=(1, 2, 3))


class Group(MemoryGroup):
    """A group that only says what it has seen."""

    def __init__(self, oom_kills: int | None) -> None:
        super().__init__(1 << 20, "a test, 1.0 MiB")
        self._usage = Usage(None, oom_kills)

    def command(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def usage(self) -> Usage:
        return self._usage


def test_a_job_survives_its_journey() -> None:
    assert job_of(json.loads(json.dumps(asdict(JOB)))) == JOB


def test_an_error_in_a_worker_is_raised_in_the_parent() -> None:
    # No plan in the world can be read from "{}": the worker reports it before it loads a model.
    with pytest.raises(FormatError):
        run_worker(JOB)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"code": "read_failed"}, ReadFailed),
        ({"code": "does_not_fit", "smallest_bytes": "77"}, DoesNotFit),
        ({"code": "not in this version"}, NexusError),
    ],
)
def test_errors_keep_their_class_message_and_hint(
    fields: dict[str, str], kind: type[NexusError]
) -> None:
    error = worker._error_of({**fields, "message": "what", "hint": "fix"})
    assert type(error) is kind
    assert (str(error), error.hint) == ("what", "fix")
    if isinstance(error, DoesNotFit):
        assert error.smallest_bytes == 77


@pytest.mark.parametrize(
    ("status", "group", "by_memory"),
    [
        (-9, Group(1), True),
        (-9, Group(None), True),  # nobody counts kills: the limit is the likely one
        (-9, Group(0), False),
        (-9, None, False),
        (-11, Group(0), False),
        (1, None, False),
    ],
)
def test_a_death_is_put_down_to_memory_only_when_it_was(
    status: int, group: Group | None, by_memory: bool
) -> None:
    died = worker._death(JOB, status, "noise\nlast words\n", group)
    assert died.by_memory is by_memory
    assert by_memory or "last words" in str(died)


def test_a_worker_that_dies_without_a_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(WorkerDied, match=r"the stock run of /m\.gguf ended with status 1"):
        run_worker(replace(JOB, side="stock"))
