"""Converts any exception into an exit code and a message for the user.

Libraries are recognised by the names of their exceptions and by their texts, so that none has to be imported.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime import gpu_errors
from luthier_trainer.runtime.failure import Failure

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
# Of gloo, and of torch's store where a process waits for the others (torch 2.13, TCPStore.cpp and socket.cpp).
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "The client socket has timed out",
    "waiting for clients",
)
# With less free space than this, a volume counts as full: checkpoints are written in larger pieces.
FULL_BYTES = 64 << 20


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and the exceptions that it was raised from, however deep libraries have wrapped them."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or link.__context__


def os_error(error: BaseException, errnos: Collection[int]) -> OSError | None:
    """The OSError behind `error` with one of these numbers, if there is one."""
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
            f"spec.workspace.size: no space is left on the volume ({found}). Enlarge its claim, or free some of it",
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
    """Exit code and message for any exception. `volume`: the folder of the workspace, where it is known."""
    if isinstance(error, Failure):
        return error.code, error.message
    names = {c.__name__ for c in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    if "OutOfMemoryError" in names:
        return ExitCode.CUDA_OUT_OF_MEMORY, f"{text}. {gpu_errors.SMALLER}"
    if "GatedRepoError" in names:
        return ExitCode.UNAUTHORIZED, f"{text}. Ask for access on the Hub and set hub.tokenSecretRef"
    if "LocalEntryNotFoundError" in names:  # a kind of EntryNotFoundError, but the client could not ask the Hub
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
    if found := gpu_errors.match(text):
        code, remedy = found
        return code, f"{text}. {remedy}" if remedy else text
    if "DistBackendError" in names or any(words in text for words in LOST):
        return ExitCode.PEER_LOST, text
    return ExitCode.TRAINING_ERROR, text
