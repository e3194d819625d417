"""What an exception, and a kill for memory, are told as: the field that decides, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import AcceleratorError
from torch.distributed import DistBackendError
from trainer.volumes import mounted

from luthier_api.exitcodes import ExitCode
from luthier_api.status import Phase
from luthier_trainer.models.hub import explain
from luthier_trainer.runtime.classify import classify
from luthier_trainer.supervisor.verdict import Evidence, judge


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


class Answered(Exception):
    """As the clients of the Hub raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from hub.example")
        self.response = SimpleNamespace(status_code=status)


def circle() -> BaseException:
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__context__ = second, first
    return first


FULL = OSError(errno.ENOSPC, "No space left on device", "/workspace/x")
FULL_SAID = (
    "spec.workspace.size: no space is left on the volume ([Errno 28] No space left on device: '/workspace/x'). Ask for"
    " more, or free some of it"
)
STORAGE = ExitCode.STORAGE_ERROR
ENDS: list[tuple[str, BaseException, ExitCode, str]] = [
    ("a full disk", FULL, STORAGE, FULL_SAID),
    ("a full disk, wrapped", wrapped(FULL), STORAGE, FULL_SAID),
    ("a full disk, wrapped twice, once without a word", wrapped(wrapped(FULL, explicitly=False)), STORAGE, FULL_SAID),
    (
        "a quota",
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        STORAGE,
        "spec.workspace.size: no space is left on the volume",
    ),
    (
        "a broken disk",
        wrapped(OSError(errno.EIO, "Input/output error")),
        STORAGE,
        (
            "spec.workspace: its volume is broken ([Errno 5] Input/output error). Look at the volume and at the node it"
            " is mounted on"
        ),
    ),
    (
        "a Hub that cannot be asked",
        LocalEntryNotFoundError("outgoing traffic"),
        ExitCode.HUB_UNAVAILABLE,
        "LocalEntryNotFoundError: outgoing",
    ),
    (
        "a file that the Hub lacks",
        EntryNotFoundError("no config.json"),
        ExitCode.NOT_FOUND,
        "EntryNotFoundError: no config.json",
    ),
    (
        "no token",
        Answered(401),
        ExitCode.UNAUTHORIZED,
        "Answered: 401 from hub.example. Check the token in hub.tokenSecretRef",
    ),
    ("too many requests", Answered(429), ExitCode.HUB_UNAVAILABLE, "Answered: 429"),
    ("a Hub that is broken", Answered(500), ExitCode.HUB_UNAVAILABLE, "Answered: 500"),
    ("causes that go round in a circle", circle(), ExitCode.TRAINING_ERROR, "RuntimeError: one"),
    (
        "a Hub that hangs up",
        httpx.ReadError("Connection reset by peer"),
        ExitCode.HUB_UNAVAILABLE,
        "ReadError: Connection reset by peer",
    ),
    (
        "a file that is another user's",
        wrapped(PermissionError(errno.EACCES, "Permission denied", "/models/base/model.safetensors")),
        ExitCode.MISCONFIGURED,
        "/models/base/model.safetensors: Permission denied. This process is ",
    ),
    (
        "a file that is not there",
        wrapped(FileNotFoundError(errno.ENOENT, "No such file")),
        ExitCode.TRAINING_ERROR,
        "RuntimeError: An error",
    ),
]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A volume of 256 KiB, of which 8 KiB are left."""
    with mounted(tmp_path / "volume", kibibytes=256) as folder:
        (folder / "rest").write_bytes(b"x" * (248 << 10))
        yield folder


TENSORS = {"weight": torch.zeros(64 << 10)}  # 256 KiB
WRITERS: list[tuple[str, Callable[[Path], object]]] = [
    ("torch", lambda folder: torch.save(TENSORS, folder / "optimizer.pt")),
    ("safetensors", lambda folder: save_file(TENSORS, folder / "model.safetensors")),
    (
        "tokenizers",
        lambda folder: Tokenizer(WordLevel({f"word {i}": i for i in range(5000)}, "word 0")).save(
            str(folder / "tokenizer.json")
        ),
    ),
    ("datasets", lambda folder: Dataset.from_dict({"text": ["x" * (64 << 10)] * 8}).save_to_disk(folder / "dataset")),
    ("Python", lambda folder: (folder / "trainer_state.json").write_text("x" * (64 << 10))),
]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[w[0] for w in WRITERS])
def test_a_full_volume_whoever_writes(name: str, write: Callable[[Path], object], full: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # each library has an exception of its own
        write(full)
    code, said = classify(caught.value, full)
    assert (code, said.startswith("spec.workspace.size: no space is left on the volume (")) == (STORAGE, True), said


def test_a_file_that_torch_cannot_write_where_there_is_space(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    code, said = classify(error, tmp_path)
    assert (code, said.startswith("spec.workspace: a file could not be written ([enforce fail")) == (
        STORAGE,
        True,
    ), said


@pytest.mark.parametrize(("name", "error", "code", "message"), ENDS, ids=[c[0] for c in ENDS])
def test_an_exception_becomes_an_end(name: str, error: BaseException, code: ExitCode, message: str) -> None:
    found, said = classify(error)
    assert (found, said[: len(message)]) == (code, message)


GPU_ENDS: list[tuple[type[Exception], str, ExitCode]] = [
    (AcceleratorError, "CUDA error: out of memory", ExitCode.CUDA_OUT_OF_MEMORY),
    (
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ExitCode.CUDA_OUT_OF_MEMORY,
    ),
    (
        DistBackendError,
        "NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        ExitCode.CUDA_OUT_OF_MEMORY,
    ),
    (AcceleratorError, "CUDA error: uncorrectable ECC error encountered", ExitCode.INFRASTRUCTURE_ERROR),
    (AcceleratorError, "CUDA error: no kernel image is available for execution on the device", ExitCode.MISCONFIGURED),
    (AcceleratorError, "CUDA error: invalid device ordinal", ExitCode.MISCONFIGURED),
    (
        DistBackendError,
        "NCCL error in: x\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 18000",
        ExitCode.MISCONFIGURED,
    ),
    (DistBackendError, "NCCL error in: x, remote process exited or there was a network error", ExitCode.PEER_LOST),
    (DistBackendError, "anything else of a group", ExitCode.PEER_LOST),
    (RuntimeError, "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5", ExitCode.PEER_LOST),
    (AcceleratorError, "CUDA error: an illegal memory access was encountered", ExitCode.TRAINING_ERROR),
]


@pytest.mark.parametrize(("kind", "text", "code"), GPU_ENDS, ids=[g[1][:60] for g in GPU_ENDS])
def test_what_cuda_and_nccl_say(kind: type[Exception], text: str, code: ExitCode) -> None:
    found, said = classify(kind(text))
    assert (found, said.startswith(f"{kind.__name__}: {text}")) == (code, True)


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
