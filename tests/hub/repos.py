"""The Hub's API of repositories: who am I, create, information, tree, refs, and the commit that ends an upload."""

import base64
import binascii
import json
from typing import Any

from aiohttp import web

from .access import USER, Refused, caller, check_read, check_write, entry_not_found
from .keys import STORE, commit_of, repo_of
from .store import Commit, File, Repo, Store, folders, git_oid, is_lfs, pointer

routes = web.RouteTableDef()
REPO = "/api/{kind:models|datasets|spaces}/{repo:[^/]+/[^/]+}"


@routes.get("/api/whoami-v2")
async def whoami(request: web.Request) -> web.Response:
    who = caller(request)
    if not who.known:
        raise Refused(401, "Invalid username or password.")
    token = {"displayName": "test", "role": who.role}
    user = {"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "isPro": False, "orgs": []}
    return web.json_response({**user, "auth": {"type": "access_token", "accessToken": token}})


@routes.post("/api/validate-yaml")
async def validate_yaml(_: web.Request) -> web.Response:
    return web.json_response({"errors": [], "warnings": []})


@routes.post("/api/repos/create")
async def create(request: web.Request) -> web.Response:
    wish = await request.json()
    namespace = wish.get("organization") or USER
    check_write(namespace, caller(request))
    kind, name = wish.get("type") or "model", f"{namespace}/{wish['name']}"
    store = request.app[STORE]
    known = store.repos.get((kind, name))
    repo = known or store.create(kind, name, private=wish.get("visibility") == "private" or bool(wish.get("private")))
    answer = {"url": f"{request.url.origin()}/{repo.prefix}{name}", "name": name}
    return web.json_response(
        answer | ({"error": f"You already created this {kind} repo"} if known else {}), status=409 if known else 200
    )


@routes.delete("/api/repos/delete")
async def delete(request: web.Request) -> web.Response:
    wish = await request.json()
    namespace, who = wish.get("organization") or USER, caller(request)
    check_write(namespace, who)
    store = request.app[STORE]
    store.delete(check_read(store.repos.get((wish.get("type") or "model", f"{namespace}/{wish['name']}")), who))
    return web.Response()


@routes.get(REPO)
@routes.get(REPO + "/revision/{revision}")
async def info(request: web.Request) -> web.Response:
    repo, _ = repo_of(request)
    commit, blobs = commit_of(request, repo), "blobs" in request.query
    siblings = [{"rfilename": path} | (blob(file) if blobs else {}) for path, file in sorted(commit.files.items())]
    return web.json_response(
        {
            "_id": git_oid(repo.id.encode())[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": date(commit),
            "createdAt": date(next(iter(repo.commits.values()))),
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    )


def blob(file: File) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}}
    return {"size": file.size, "blobId": file.oid} | (lfs if file.lfs else {})


def date(commit: Commit) -> str:
    return commit.date[:23] + "Z"


@routes.get(REPO + "/auth-check")
@routes.get(REPO + "/auth-check/write")
async def auth_check(request: web.Request) -> web.Response:
    repo, who = repo_of(request)
    if request.path.endswith("/write"):
        check_write(repo.id.split("/")[0], who)
    return web.Response()


@routes.get(REPO + "/tree/{revision}")
@routes.get(REPO + "/tree/{revision}/{path:.+}")
async def tree(request: web.Request) -> web.Response:
    repo, _ = repo_of(request)
    commit, folder = commit_of(request, repo), request.match_info.get("path", "").strip("/")
    recursive = request.query.get("recursive", "").lower() == "true"
    inside = f"{folder}/" if folder else ""
    if folder and folder not in folders(commit.files):
        raise entry_not_found()
    names = [*sorted(folders(commit.files)), *sorted(commit.files)]
    chosen = [name for name in names if name.startswith(inside) and (recursive or "/" not in name[len(inside) :])]
    return web.json_response([entry(commit, name) for name in chosen])


@routes.post(REPO + "/paths-info/{revision}")
async def paths_info(request: web.Request) -> web.Response:
    repo, _ = repo_of(request)
    commit, form = commit_of(request, repo), await request.post()
    known = commit.files.keys() | folders(commit.files)
    return web.json_response([entry(commit, str(path)) for path in form.getall("paths", []) if path in known])


def entry(commit: Commit, path: str) -> dict[str, Any]:
    last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": date(commit)}}
    if path not in commit.files:
        return {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path} | last
    file = commit.files[path]
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}}
    return {"type": "file", "oid": file.oid, "size": file.size, "path": path} | last | (lfs if file.lfs else {})


@routes.get(REPO + "/refs")
async def refs(request: web.Request) -> web.Response:
    repo, _ = repo_of(request)

    def listed(names: dict[str, str], folder: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in names.items()]

    answer = {
        "branches": listed(repo.branches, "heads"),
        "tags": listed(repo.tags, "tags"),
        "converts": [],
        "pullRequests": [],
    }
    return web.json_response(answer)


@routes.get(REPO + "/commits/{revision}")
async def commits(request: web.Request) -> web.Response:
    repo, _ = repo_of(request)
    authors = [{"user": USER}]
    return web.json_response(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "date": date(commit),
                "authors": authors,
            }
            for commit in repo.history(commit_of(request, repo))
        ]
    )


def writable(request: web.Request) -> Repo:
    repo, who = repo_of(request)
    check_write(repo.id.split("/")[0], who)
    return repo


@routes.post(REPO + "/branch/{revision}")
@routes.post(REPO + "/tag/{revision}")
async def add_ref(request: web.Request) -> web.Response:
    """A tag is posted to the revision it points at, a branch to its own name with the revision in the body."""
    repo = writable(request)
    wish = await request.json() if request.can_read_body else {}
    if "/tag/" in request.path:
        refs, name, target = repo.tags, wish["tag"], commit_of(request, repo)
    else:
        refs, name, target = repo.branches, request.match_info["revision"], repo.commits[repo.branches["main"]]
    if name in refs:
        raise Refused(409, f"Reference already exists: {name}")
    refs[name] = target.oid
    request.app[STORE].save(repo)
    return web.Response()


@routes.post(REPO + "/preupload/{revision}")
async def preupload(request: web.Request) -> web.Response:
    """Which of the files go by LFS, and what each path holds now, so that the client leaves out what has not
    changed.
    """
    repo = writable(request)
    commit = commit_of(request, repo)
    answers = []
    for file in (await request.json())["files"]:
        large = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
        known = commit.files.get(file["path"])
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": known.etag} if known else {}))
    return web.json_response({"files": answers, "commitOid": commit.oid})


@routes.post(REPO + "/commit/{revision}")
async def commit(request: web.Request) -> web.Response:
    repo = writable(request)
    branch, store = request.match_info["revision"], request.app[STORE]
    head = repo.commits.get(repo.branches.get(branch, ""))
    if head is None:
        raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    lines = [json.loads(line) for line in (await request.text()).splitlines() if line]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, head.oid):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    tree = changed(head.files, lines, store)
    made = store.commit(repo, branch, header["summary"], header.get("description", ""), tree)
    url = f"{request.url.origin()}/{repo.prefix}{repo.id}/commit/{made.oid}"
    return web.json_response({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def changed(files: dict[str, File], lines: list[dict[str, Any]], store: Store) -> dict[str, File]:
    """`files` after the operations of a commit."""
    tree = dict(files)
    for line in lines:
        value = line["value"]
        match line["key"]:
            case "file":
                try:
                    tree[value["path"]] = store.regular(base64.b64decode(value["content"], validate=True))
                except binascii.Error as error:
                    raise Refused(400, f"{value['path']}: not base64") from error
            case "lfsFile":
                try:
                    tree[value["path"]] = store.large(value["oid"])
                except FileNotFoundError as error:
                    raise Refused(
                        400, f"LFS pointer of {value['path']} points to a file that does not exist"
                    ) from error
            case "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            case "deletedFolder":
                inside = value["path"].rstrip("/") + "/"
                if not any(path.startswith(inside) for path in tree):
                    raise Refused(404, f"A folder with this name doesn't exist: {value['path']}", "EntryNotFound")
                tree = {path: file for path, file in tree.items() if not path.startswith(inside)}
    return tree
