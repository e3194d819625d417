"""What an exception, and a kill for memory, are told as: the field that decides, and what to do about it."""

from __future__ import annotations

import errno

import pytest

from luthier_api.exitcodes import ExitCode
from luthier_api.status import Phase
from luthier_trainer.ending import classify
from luthier_trainer.hub import explain
from luthier_trainer.verdict import Evidence, judge


def wrapped(cause: BaseException, explicitly: bool = True) -> BaseException:
    """`cause`, as a library raises it."""
    try:
        try:
            raise cause
        except OSError as error:
            if explicitly:
                raise RuntimeError("An error occurred while generating the dataset") from error
            raise RuntimeError("An error occurred while generating the dataset")  # noqa: B904  # as careless libraries do
    except RuntimeError as error:
        return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/workspace/x")
FULL_SAID = "spec.workspace.size: no space is left on the volume ([Errno 28] No space left on device: '/workspace/x'). Ask for more, or free some of it"
STORAGE = ExitCode.STORAGE_ERROR
ENDS: list[tuple[str, BaseException, ExitCode, str]] = [
    ("a full disk", FULL, STORAGE, FULL_SAID),
    ("a full disk, wrapped", wrapped(FULL), STORAGE, FULL_SAID),
    ("a full disk, wrapped twice, once without a word", wrapped(wrapped(FULL, explicitly=False)), STORAGE, FULL_SAID),
    ("a quota", OSError(errno.EDQUOT, "Disk quota exceeded"), STORAGE, "spec.workspace.size: no space is left on the volume"),
    ("a broken disk", wrapped(OSError(errno.EIO, "Input/output error")), STORAGE,
     "spec.workspace: its volume is broken ([Errno 5] Input/output error). Look at the volume and at the node it is mounted on"),
    ("a file that is not there", wrapped(FileNotFoundError(errno.ENOENT, "No such file")), ExitCode.TRAINING_ERROR, "RuntimeError: An error"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "code", "message"), ENDS, ids=[c[0] for c in ENDS])
def test_an_exception_becomes_an_end(name: str, error: BaseException, code: ExitCode, message: str) -> None:
    found, said = classify(error)
    assert (found, said[: len(message)]) == (code, message)


def test_a_disk_that_is_full_while_the_hub_answers() -> None:
    failure = explain(wrapped(FULL), "spec.dataset.id", "dataset org/rows")  # type: ignore[arg-type]
    assert (failure.code, failure.message) == (STORAGE, FULL_SAID)


SHORT_OF_MEMORY: list[tuple[Phase, str, str]] = [
    ("prepare", "jobs.memoryRequest: ", "spec.resources is for the run alone. Fewer rows (split) need less"),
    ("run", "spec.resources.memory: ", "Raise it, or lower batch sizes or maxLength"),
    ("publish", "jobs.memoryRequest: ", "spec.resources is for the run alone"),
]


@pytest.mark.parametrize(("phase", "field", "remedy"), SHORT_OF_MEMORY)
def test_memory_is_asked_for_where_the_phase_gets_it_from(phase: Phase, field: str, remedy: str) -> None:
    said = judge(Evidence(phase=phase, status=-9, memory_kills=1))
    assert said.code == ExitCode.HOST_OUT_OF_MEMORY
    assert said.message.startswith(f"{field}the container ran out of memory and the kernel killed a process. ")
    assert said.message.endswith(remedy)
