"""How a process of a phase ends: whatever ended it becomes a code and a message, in a file that the supervisor reads.

A process writes `result-<rank>.json` into the run folder. After a good end, and after an agreed stop, it exits with 0
whatever the message's code: a worker that exits with another code makes torch's agent kill its siblings, and every code
becomes 1. Neighbours: `process`, whose ends these are, and `supervisor`, which turns the ranks' messages into the pod's
exit code.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.variables import Variables
from luthier_trainer import gpuerrors

if TYPE_CHECKING:
    # Its types cost more than all else here, and PID 1 ends this way too
    from luthier_api.termination import (
        TerminationMessage,
    )

# In the run folder: the first is written by PID 1, the others by the phase, before its first step and from then on.
STOP_FILE, STARTING_FILE, HEARTBEAT_FILE = "stop", "starting", "heartbeat"
FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
STORAGE_ERRNOS = FULL_ERRNOS | {errno.EIO, errno.EROFS, errno.ESTALE}
FORBIDDEN_ERRNOS = {errno.EACCES, errno.EPERM}
# What is left of ENOSPC and EDQUOT where Rust (safetensors, tokenizers) and C++ (torch) write files: no errno, and from
# torch not even the reason.
FULL_TEXTS = re.compile(r"No space left on device|Disk quota exceeded|\bos error (28|122)\b")
UNWRITTEN_TEXTS = re.compile(
    r"PytorchStreamWriter failed writing|inline_container\.cc.*(unexpected pos|file write failed)|unexpected pos \d+"
    r" vs \d+",
    re.DOTALL,
)
# With less free space than this, a volume counts as full: checkpoints are written in larger pieces.
FULL_BYTES = 64 << 20
START_OVER = "Start over: with --fresh on a laptop, under another metadata.name on a cluster"


class Failure(Exception):
    """An end that we understand. `message` is for the user: path of the field, what was found, what to do."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def run_dir() -> Path:
    """Writable folder of this pod: stop flag, heartbeat, results of the ranks."""
    return Path(os.environ.get(Variables.RUN_DIR) or "/run/luthier")


def stop_requested() -> bool:
    """Whether the supervisor wants this pod's work to end at the next step or batch."""
    return (run_dir() / STOP_FILE).exists()


def beat() -> None:
    """Tell the supervisor that the work goes on: once a step or batch, and while files are written or read."""
    (run_dir() / HEARTBEAT_FILE).touch()


def beat_before_training() -> None:
    """The same before the first step, which may still be slow to come: the model is loaded, and perhaps compiled."""
    (run_dir() / STARTING_FILE).touch()


def result_file(rank: int) -> Path:
    return run_dir() / f"result-{rank}.json"


def global_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what it was raised from, however deep libraries have wrapped it."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or link.__context__


def os_error(error: BaseException, errnos: Collection[int]) -> OSError | None:
    """The system's complaint behind `error`."""
    return next((link for link in chain(error) if isinstance(link, OSError) and link.errno in errnos), None)


def storage_failure(error: BaseException, volume: Path | None) -> tuple[ExitCode, str] | None:
    """Code and message where a file could not be written or read; None for other errors. `volume`: the workspace, to
    look at its free bytes.
    """
    broken = os_error(error, STORAGE_ERRNOS)
    text = next((f"{link}" for link in chain(error) if FULL_TEXTS.search(f"{link}")), "")
    unwritten = next((f"{link}" for link in chain(error) if UNWRITTEN_TEXTS.search(f"{link}")), "")
    found = " ".join(f"{broken or text or unwritten}".split())[:300]
    if (broken and broken.errno in FULL_ERRNOS) or text or (unwritten and volume and is_full(volume)):
        return (
            ExitCode.STORAGE_ERROR,
            f"spec.workspace.size: no space is left on the volume ({found}). Ask for more, or free some of it",
        )
    if broken:
        return (
            ExitCode.STORAGE_ERROR,
            f"spec.workspace: its volume is broken ({found}). Look at the volume and at the node it is mounted on",
        )
    if unwritten:
        return (
            ExitCode.STORAGE_ERROR,
            (
                f"spec.workspace: a file could not be written ({found}). Look at the volume and at the node it is"
                " mounted on"
            ),
        )
    return None


def is_full(volume: Path) -> bool:
    try:
        facts = os.statvfs(volume)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize < FULL_BYTES


def classify(error: BaseException, volume: Path | None = None) -> tuple[ExitCode, str]:
    """Exit code and message for any exception. Libraries are looked up by name, so that nothing is imported for it.

    `volume`: the folder of the workspace, where it is known.
    """
    if isinstance(error, Failure):
        return error.code, error.message
    names = {c.__name__ for c in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    if "OutOfMemoryError" in names:
        return ExitCode.CUDA_OUT_OF_MEMORY, f"{text}. {gpuerrors.SMALLER}"
    if "GatedRepoError" in names:
        return ExitCode.UNAUTHORIZED, f"{text}. Ask for access on the Hub and set hub.tokenSecretRef"
    if "LocalEntryNotFoundError" in names:  # to huggingface_hub an entry that was not found: it could not ask
        return ExitCode.HUB_UNAVAILABLE, text
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"}:
        return ExitCode.NOT_FOUND, text
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ExitCode.UNAUTHORIZED, f"{text}. Check the token in hub.tokenSecretRef"
    if status is not None and (status == 429 or status >= 500):
        return ExitCode.HUB_UNAVAILABLE, text
    module = type(error).__module__.split(".")[0]
    if module in {"httpx", "httpx2", "httpcore", "httpcore2"} or "OfflineModeIsEnabled" in names:
        return ExitCode.HUB_UNAVAILABLE, text
    if storage := storage_failure(error, volume):
        return storage
    if (forbidden := os_error(error, FORBIDDEN_ERRNOS)) and forbidden.filename:
        return (
            ExitCode.MISCONFIGURED,
            (
                f"{forbidden.filename}: {forbidden.strerror}. This process is {os.getuid()}:{os.getgid()}; give the"
                " file and its folders to that user or group, or the right to read them to all"
            ),
        )
    if found := gpuerrors.read(text):
        code, remedy = found
        return code, f"{text}. {remedy}" if remedy else text
    if "DistBackendError" in names or any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer")
    ):
        return ExitCode.PEER_LOST, text
    return ExitCode.TRAINING_ERROR, text


def write_result(message: TerminationMessage, rank: int | None = None) -> None:
    """Leave the message for the supervisor, whole or not at all."""
    path = result_file(global_rank() if rank is None else rank)
    partial = path.with_suffix(".partial")
    partial.write_bytes(message.encode())
    partial.replace(path)
