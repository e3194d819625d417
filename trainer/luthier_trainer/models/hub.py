"""Requests to the Hub with time limits, retries with back-off, and errors that name the field of the spec.

huggingface_hub's own client waits without limit for a server that accepts a connection and never answers, and does not
retry commits.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
REPO, TOKEN = "spec.hub.repo", "spec.hub.tokenSecretRef"
CONNECT_SECONDS, SILENCE_SECONDS = 15.0, 60.0  # limits for a connection, and between two packets of an answer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; the pause doubles after each attempt
DEADLINE = "LUTHIER_HUB_DEADLINE"  # environment variable, in seconds
DEADLINE_SECONDS = 300.0
# Statuses that are temporary although they are 4xx. The client itself handles the 409 of a repository that exists
# already.
TOO_SOON, CONFLICTS = (
    {408, 429},
    {409, 412},
)
SENDABLE = re.compile(r"[!-~]+")  # printable ASCII without blanks, as the header Authorization requires
# URLs of the object store behind a Hub. They are signed and expire, so its 400 (slow connection) and 403 (expired
# signature) are not mistakes of the user.
SIGNED = re.compile(r"[?&](X-[A-Za-z]+-)?Signature=", re.IGNORECASE)


def deadline_seconds() -> float:
    """Return for how many seconds one pod retries while the Hub is unavailable.

    The next pod of the phase continues from there.
    """
    return float(os.environ.get(DEADLINE) or DEADLINE_SECONDS)


def endpoint() -> str:
    """Return the URL of the Hub that the administrator has set: huggingface.co, a mirror, or their own."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_api() -> HfApi:
    """Return a client with time limits and the token of this pod. Without a token it is anonymous."""
    from huggingface_hub import HfApi

    _limit_waiting()
    return HfApi(endpoint=endpoint(), token=hub_token() or False)


def hub_token() -> str | None:
    """Return the token of this pod, or None. On a laptop, the one of `hf auth login` is used if none is set.

    Raises Failure(UNAUTHORIZED) for a token that cannot be sent: the client's own error message would contain it.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except UnicodeDecodeError:
        token = "\0"  # the file of `hf auth login` is not text; this value is refused below
    if token and not SENDABLE.fullmatch(token):
        raise Failure(
            ExitCode.UNAUTHORIZED,
            f"{TOKEN}: the token (HF_TOKEN in the pod) holds a blank or another character that no token has. Copy it"
            " again, alone, as one line",
        )
    return token


def check_target(run: FineTuneRun | GenerateRun) -> None:
    """Check what `publish` would refuse after all the work and what can be checked without the Hub.

    These are the name of the repository and the characters of the token. Raises Failure if one is not valid.
    """
    hub = run.spec.hub
    if hub is None or hub.repo is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub.repo)
    except HFValidationError as error:
        raise explain(error, REPO, hub.repo) from error
    hub_token()


@functools.cache
def _limit_waiting() -> None:
    """Set time limits on the requests of all clients that huggingface_hub creates in this process."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        return made

    set_client_factory(client)


def patiently(call: Callable[[], T], field: str, what: str, seconds: float | None = None) -> T:
    """Return the result of `call`, which is repeated while the Hub is unavailable, for at most `seconds`.

    The time is counted from the first error of this kind, so a long upload before it does not count. Raises Failure,
    which names `field` and `what`, for any other error and when the time is over.
    """
    until: float | None = None
    pause = FIRST_PAUSE
    while True:
        try:
            return call()
        except Failure:
            raise
        except Exception as error:
            failure = explain(error, field, what)
            wait = max(pause, _asked_to_wait(error))
            until = until or time.monotonic() + (deadline_seconds() if seconds is None else seconds)
            if failure.code is not ExitCode.HUB_UNAVAILABLE or time.monotonic() + wait > until:
                raise failure from error
            print(f"hub: {failure.message}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


def _asked_to_wait(error: BaseException) -> float:
    """Return the seconds that a 429 asks for in its Retry-After, at most 60; 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), 2 * LONGEST_PAUSE)
    except ValueError:
        return 0.0


def explain(error: Exception, field: str, what: str) -> Failure:
    """Return the Failure for an exception of the Hub's clients, with a message for the user.

    `field` is the path in the spec, `what` names the repository. The exception and its causes are all considered.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {c.__name__ for e in chain for c in type(e).__mro__}
    answers = [answer for e in chain if (answer := getattr(e, "response", None)) is not None]
    signed = any(SIGNED.search(str(getattr(answer, "url", ""))) for answer in answers)
    status = None if signed else next((s for answer in answers if (s := getattr(answer, "status_code", None))), None)
    # Remove the query: the signature in it grants write access.
    said = _in_one_line(re.sub(r"\?[^\s']*", "", str(error)) if signed else str(error))
    words = _in_one_line(next((m for e in chain if (m := getattr(e, "server_message", None))), "")).rstrip(".")
    where = f"{what} on {endpoint()}"
    if "HFValidationError" in names:
        return Failure(ExitCode.INVALID_SPEC, f"{field}: the Hub does not accept this name: {said}")
    if "GatedRepoError" in names:
        return Failure(ExitCode.UNAUTHORIZED, f"{field}: {where} is gated. Ask for access there, and set {TOKEN}")
    if "RevisionNotFoundError" in names:
        place = field.removesuffix(".id")
        return Failure(ExitCode.NOT_FOUND, f"{place}.revision: {where} has no such branch, tag or commit")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} and not (status in (401, 403) and hub_token()):
        hint = "" if hub_token() else f", or it is private: then set {TOKEN}"
        return Failure(ExitCode.NOT_FOUND, f"{field}: there is no {where}{hint}")
    if status in (401, 403):
        reason = f": {words}" if words else ""
        return Failure(
            ExitCode.UNAUTHORIZED,
            f"{TOKEN}: the Hub refused the token for {where} ({status}){reason}. Check its value and its rights",
        )
    if status == 404:
        return Failure(ExitCode.NOT_FOUND, f"{field}: there is no {where}")
    if status in CONFLICTS:
        return Failure(
            ExitCode.HUB_UNAVAILABLE, f"{field}: {where} is being changed by another client ({status}): {words or said}"
        )
    code, text = classify(error)
    if code is ExitCode.STORAGE_ERROR:
        return Failure(code, text)
    if status is not None and 400 <= status < 500 and status not in TOO_SOON:
        return Failure(ExitCode.INVALID_SPEC, f"{field}: {where} refused ({status}): {words or said}")
    away = (
        signed
        or any(isinstance(e, ConnectionError | TimeoutError) for e in chain)
        or any(classify(e)[0] is ExitCode.HUB_UNAVAILABLE for e in chain)
    )
    if away:
        return Failure(ExitCode.HUB_UNAVAILABLE, f"{field}: {where} cannot be reached: {said}")
    return Failure(code, f"{field}: {where}: {said}")


def _in_one_line(text: str) -> str:
    """Return the text in one line, at most 300 characters long."""
    return " ".join(text.split())[:300]
