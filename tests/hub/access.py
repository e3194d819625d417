"""Who may do what, and the headers by which the Hub says no: the client picks its exception class by them.

Over plain HTTP the client does not guess from a bare 401 (it does for https), so X-Error-Code is always sent.
"""

from dataclasses import dataclass

from aiohttp import web

from .store import Repo

WRITE_TOKEN, READ_TOKEN = "hf_writer", "hf_reader"
USER = "luthier"
CLOSED_NAMESPACE = "elsewhere"  # nobody here may write to it
INVALID_CREDENTIALS = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Caller:
    role: str  # write, read, anonymous, invalid

    @property
    def known(self) -> bool:
        return self.role in ("write", "read")


def caller(request: web.Request) -> Caller:
    header = request.headers.get("Authorization")
    if header is None:
        return Caller("anonymous")
    token = header.removeprefix("Bearer ")
    return Caller({WRITE_TOKEN: "write", READ_TOKEN: "read"}.get(token, "invalid"))


class Refused(Exception):
    """Becomes an answer with the Hub's error headers; not aiohttp's HTTPException, so that one place writes them."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def response(self) -> web.Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return web.json_response({"error": self.message}, status=self.status, headers=headers)


def repo_not_found(who: Caller) -> Refused:
    """To a stranger a missing repository and a private one look the same."""
    return Refused(404 if who.known else 401, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> Refused:
    return Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found() -> Refused:
    return Refused(404, "Entry not found", "EntryNotFound")


def check_credentials(who: Caller) -> None:
    if who.role == "invalid":
        raise Refused(401, INVALID_CREDENTIALS)


def check_read(repo: Repo | None, who: Caller) -> Repo:
    if repo is None or (repo.private and not who.known):
        raise repo_not_found(who)
    return repo


def check_content(repo: Repo, who: Caller) -> None:
    """A gated repository shows its file list to everybody and its files to the writer only."""
    if repo.gated and who.role != "write":
        message = (
            f"Access to {repo.type} {repo.id} is restricted. You must have access to it and be authenticated to"
            " access it."
        )
        raise Refused(403 if who.known else 401, message, "GatedRepo")


def check_write(namespace: str, who: Caller) -> None:
    if who.role == "anonymous":
        raise Refused(401, "Invalid username or password.")
    if who.role != "write":
        raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
    if namespace == CLOSED_NAMESPACE:
        raise Refused(403, f"You don't have the required permissions to write to the namespace {namespace}")
