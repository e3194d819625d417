"""What the handlers find in the application, by typed keys."""

from aiohttp import web

from .access import Caller, caller, check_read, revision_not_found
from .faults import Control
from .store import Commit, Repo, Store

STORE = web.AppKey("store", Store)
CONTROL = web.AppKey("control", Control)
PENDING = web.AppKey("pending", set[str])  # sha256 that an LFS batch has announced: the only ones that may be put


def repo_of(request: web.Request) -> tuple[Repo, Caller]:
    """The repository that the path names, if the caller may know of it."""
    who = caller(request)
    kind = (request.match_info.get("kind") or "models").rstrip("/").removesuffix("s")
    return check_read(request.app[STORE].repos.get((kind, request.match_info["repo"])), who), who


def commit_of(request: web.Request, repo: Repo) -> Commit:
    revision = request.match_info.get("revision", "main")
    commit = repo.resolve(revision)
    if commit is None:
        raise revision_not_found(revision)
    return commit
