"""Content: `resolve` (what a download asks), the LFS batch (what an upload asks), and the blobs behind both.

The Hub answers for a large file with a redirect to its content network; here it is sent at once, with the headers of
both.
"""

import hashlib
import re
from pathlib import Path

from aiohttp import web

from .access import Refused, check_content, check_write, entry_not_found
from .keys import PENDING, STORE, commit_of, repo_of

routes = web.RouteTableDef()
PAGE = "/{kind:(?:datasets/|spaces/)?}{repo:[^/]+/[^/]+}"
CHUNK = 1024 * 1024
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@routes.get(PAGE + "/resolve/{revision}/{path:.+}")
async def resolve(request: web.Request) -> web.StreamResponse:
    repo, who = repo_of(request)
    check_content(repo, who)
    commit = commit_of(request, repo)
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(request.match_info["path"])
    if file is None:
        response = entry_not_found().response()
        response.headers.update(headers)
        return response
    headers["ETag"] = f'"{file.etag}"'
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)} if file.lfs else {}
    return await send(request, request.app[STORE].blob(file.sha256), headers | linked)


async def send(request: web.Request, path: Path, headers: dict[str, str]) -> web.StreamResponse:
    """The file, or the one range asked for: downloads resume, and parquet readers take only the columns they need."""
    size = path.stat().st_size
    first, last = asked(request.headers.get("Range"), size)
    partial = {"Content-Range": f"bytes {first}-{last}/{size}"} if "Range" in request.headers else {}
    common = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(last - first + 1),
        "Content-Type": "application/octet-stream",
    }
    response = web.StreamResponse(status=206 if partial else 200, headers={**headers, **partial, **common})
    await response.prepare(request)
    if request.method != "HEAD":
        with path.open("rb") as content:
            content.seek(first)
            left = last - first + 1
            while left and (chunk := content.read(min(CHUNK, left))):
                await response.write(chunk)
                left -= len(chunk)
    return response


def asked(header: str | None, size: int) -> tuple[int, int]:
    """First and last byte of a range header; the whole file without one."""
    match = RANGE.fullmatch(header or "")
    if not match or match.groups() == ("", ""):
        return 0, size - 1
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size - 1
    if int(first) >= size:
        raise Refused(416, f"Range {header} of {size} bytes")
    return int(first), min(int(last or size), size - 1)


@routes.post("/{kind:(?:datasets/|spaces/)?}{repo:[^/]+/[^/]+}.git/info/lfs/objects/batch")
async def batch(request: web.Request) -> web.Response:
    repo, who = repo_of(request)
    check_write(repo.id.split("/")[0], who)
    store, origin, objects = request.app[STORE], request.url.origin(), []
    for wanted in (await request.json())["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if not store.blob(wanted["oid"]).exists():
            request.app[PENDING].add(wanted["oid"])
            answer["actions"] = {
                "upload": {"href": f"{origin}/_blobs/{wanted['oid']}"},
                "verify": {"href": f"{origin}/_verify/{repo.prefix}{repo.id}"},
            }
        objects.append(answer)
    return web.json_response({"transfer": "basic", "objects": objects})


@routes.put("/_blobs/{sha256:[0-9a-f]{64}}")
async def put_blob(request: web.Request) -> web.Response:
    """Without credentials, as the Hub's signed addresses are."""
    sha256, store, digest = request.match_info["sha256"], request.app[STORE], hashlib.sha256()
    if sha256 not in request.app[PENDING]:
        raise Refused(403, "No LFS batch has announced this object")
    partial = store.blobs / f"{sha256}.upload"
    with partial.open("wb") as target:
        async for chunk in request.content.iter_chunked(CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise Refused(400, f"The content of {sha256} has another digest")
    partial.rename(store.blob(sha256))
    request.app[PENDING].discard(sha256)
    return web.Response()


@routes.post("/_verify/{rest:.+}")
async def verify(request: web.Request) -> web.Response:
    claim = await request.json()
    path = request.app[STORE].blob(claim["oid"])
    if not path.exists() or path.stat().st_size != claim["size"]:
        raise Refused(422, f"{claim['oid']}: not here with {claim['size']} bytes")
    return web.Response()
