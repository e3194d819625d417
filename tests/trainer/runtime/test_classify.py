"""What an exception, and a kill for memory, are told as: the field that decides, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    "spec.workspace.size: no space is left on the volume ([Errno 28] No space left on device: '/workspace/x'). Enlarge"
    " its claim, or free some of it"
)
STORAGE = ExitCode.STORAGE_ERROR


@dataclass(frozen=True)
class EndCase:
    name: str
    error: BaseException
    code: ExitCode
    message: str


ENDS = [
    EndCase(
        name="a full disk",
        error=FULL,
        code=STORAGE,
        message=FULL_SAID,
    ),
    EndCase(
        name="a full disk, wrapped",
        error=wrapped(FULL),
        code=STORAGE,
        message=FULL_SAID,
    ),
    EndCase(
        name="a full disk, wrapped twice, once without a word",
        error=wrapped(wrapped(FULL, explicitly=False)),
        code=STORAGE,
        message=FULL_SAID,
    ),
    EndCase(
        name="a quota",
        error=OSError(errno.EDQUOT, "Disk quota exceeded"),
        code=STORAGE,
        message="spec.workspace.size: no space is left on the volume",
    ),
    EndCase(
        name="a broken disk",
        error=wrapped(OSError(errno.EIO, "Input/output error")),
        code=STORAGE,
        message=(
            "spec.workspace: its volume is broken ([Errno 5] Input/output error). Look at the volume and at the node it"
            " is mounted on"
        ),
    ),
    EndCase(
        name="a Hub that cannot be asked",
        error=LocalEntryNotFoundError("outgoing traffic"),
        code=ExitCode.HUB_UNAVAILABLE,
        message="LocalEntryNotFoundError: outgoing",
    ),
    EndCase(
        name="a file that the Hub lacks",
        error=EntryNotFoundError("no config.json"),
        code=ExitCode.NOT_FOUND,
        message="EntryNotFoundError: no config.json",
    ),
    EndCase(
        name="no token",
        error=Answered(401),
        code=ExitCode.UNAUTHORIZED,
        message="Answered: 401 from hub.example. Check the token in hub.tokenSecretRef",
    ),
    EndCase(
        name="too many requests",
        error=Answered(429),
        code=ExitCode.HUB_UNAVAILABLE,
        message="Answered: 429",
    ),
    EndCase(
        name="a Hub that is broken",
        error=Answered(500),
        code=ExitCode.HUB_UNAVAILABLE,
        message="Answered: 500",
    ),
    EndCase(
        name="causes that go round in a circle",
        error=circle(),
        code=ExitCode.TRAINING_ERROR,
        message="RuntimeError: one",
    ),
    EndCase(
        name="a Hub that hangs up",
        error=httpx.ReadError("Connection reset by peer"),
        code=ExitCode.HUB_UNAVAILABLE,
        message="ReadError: Connection reset by peer",
    ),
    EndCase(
        name="a file that is another user's",
        error=wrapped(PermissionError(errno.EACCES, "Permission denied", "/models/base/model.safetensors")),
        code=ExitCode.MISCONFIGURED,
        message="/models/base/model.safetensors: Permission denied. This process is ",
    ),
    EndCase(
        name="a file that is not there",
        error=wrapped(FileNotFoundError(errno.ENOENT, "No such file")),
        code=ExitCode.TRAINING_ERROR,
        message="RuntimeError: An error",
    ),
]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A volume of 256 KiB, of which 8 KiB are left."""
    with mounted(tmp_path / "volume", kibibytes=256) as folder:
        (folder / "rest").write_bytes(b"x" * (248 << 10))
        yield folder


TENSORS = {"weight": torch.zeros(64 << 10)}  # 256 KiB


@dataclass(frozen=True)
class WriterCase:
    name: str
    write: Callable[[Path], object]


WRITERS = [
    WriterCase(
        name="torch",
        write=lambda folder: torch.save(TENSORS, folder / "optimizer.pt"),
    ),
    WriterCase(
        name="safetensors",
        write=lambda folder: save_file(TENSORS, folder / "model.safetensors"),
    ),
    WriterCase(
        name="tokenizers",
        write=lambda folder: Tokenizer(WordLevel({f"word {i}": i for i in range(5000)}, "word 0")).save(
            str(folder / "tokenizer.json")
        ),
    ),
    WriterCase(
        name="datasets",
        write=lambda folder: Dataset.from_dict({"text": ["x" * (64 << 10)] * 8}).save_to_disk(folder / "dataset"),
    ),
    WriterCase(
        name="Python",
        write=lambda folder: (folder / "trainer_state.json").write_text("x" * (64 << 10)),
    ),
]


@pytest.mark.parametrize("case", WRITERS, ids=lambda case: case.name)
def test_a_full_volume_whoever_writes(case: WriterCase, full: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # each library has an exception of its own
        case.write(full)
    code, said = classify(caught.value, full)
    assert (code, said.startswith("spec.workspace.size: no space is left on the volume (")) == (STORAGE, True), said


def test_a_file_that_torch_cannot_write_where_there_is_space(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    code, said = classify(error, tmp_path)
    assert (code, said.startswith("spec.workspace: a file could not be written ([enforce fail")) == (
        STORAGE,
        True,
    ), said


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case.name)
def test_an_exception_becomes_an_end(case: EndCase) -> None:
    found, said = classify(case.error)
    assert (found, said[: len(case.message)]) == (case.code, case.message)


@dataclass(frozen=True)
class GpuEndCase:
    error: type[Exception]
    message: str
    code: ExitCode


GPU_ENDS = [
    GpuEndCase(
        error=AcceleratorError,
        message="CUDA error: out of memory",
        code=ExitCode.CUDA_OUT_OF_MEMORY,
    ),
    GpuEndCase(
        error=RuntimeError,
        message="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        code=ExitCode.CUDA_OUT_OF_MEMORY,
    ),
    GpuEndCase(
        error=DistBackendError,
        message="NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        code=ExitCode.CUDA_OUT_OF_MEMORY,
    ),
    GpuEndCase(
        error=AcceleratorError,
        message="CUDA error: uncorrectable ECC error encountered",
        code=ExitCode.INFRASTRUCTURE_ERROR,
    ),
    GpuEndCase(
        error=AcceleratorError,
        message="CUDA error: no kernel image is available for execution on the device",
        code=ExitCode.MISCONFIGURED,
    ),
    GpuEndCase(
        error=AcceleratorError,
        message="CUDA error: invalid device ordinal",
        code=ExitCode.MISCONFIGURED,
    ),
    GpuEndCase(
        error=DistBackendError,
        message="NCCL error in: x\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 18000",
        code=ExitCode.MISCONFIGURED,
    ),
    GpuEndCase(
        error=DistBackendError,
        message="NCCL error in: x, remote process exited or there was a network error",
        code=ExitCode.PEER_LOST,
    ),
    GpuEndCase(
        error=DistBackendError,
        message="anything else of a group",
        code=ExitCode.PEER_LOST,
    ),
    GpuEndCase(
        error=RuntimeError,
        message="[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5",
        code=ExitCode.PEER_LOST,
    ),
    GpuEndCase(
        error=AcceleratorError,
        message="CUDA error: an illegal memory access was encountered",
        code=ExitCode.TRAINING_ERROR,
    ),
]


@pytest.mark.parametrize("case", GPU_ENDS, ids=lambda case: case.message[:60])
def test_what_cuda_and_nccl_say(case: GpuEndCase) -> None:
    found, said = classify(case.error(case.message))
    assert (found, said.startswith(f"{case.error.__name__}: {case.message}")) == (case.code, True)


def test_a_disk_that_is_full_while_the_hub_answers() -> None:
    failure = explain(wrapped(FULL), "spec.dataset.id", "dataset org/rows")  # type: ignore[arg-type]
    assert (failure.code, failure.message) == (STORAGE, FULL_SAID)


@dataclass(frozen=True)
class ShortOfMemoryCase:
    phase: Phase
    field: str
    remedy: str


SHORT_OF_MEMORY = [
    ShortOfMemoryCase(
        phase="prepare",
        field="spec.prepare.memory: ",
        remedy="have the administrator raise that. Fewer rows (split) need less",
    ),
    ShortOfMemoryCase(
        phase="run",
        field="spec.resources.memory: ",
        remedy="Raise it, or lower batch sizes or maxLength",
    ),
    ShortOfMemoryCase(
        phase="publish",
        field="spec.publish.memory: ",
        remedy="have the administrator raise that",
    ),
]


@pytest.mark.parametrize("case", SHORT_OF_MEMORY, ids=lambda case: case.phase)
def test_memory_is_asked_for_where_the_phase_gets_it_from(case: ShortOfMemoryCase) -> None:
    said = judge(Evidence(phase=case.phase, status=-9, memory_kills=1, memory_limit="8Gi"))
    assert said.code == ExitCode.HOST_OUT_OF_MEMORY
    assert said.message.startswith(f"{case.field}the container ran out of memory and the kernel killed a process. ")
    assert said.message.endswith(case.remedy)
