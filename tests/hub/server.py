"""The server: routes, the request's way through faults and credentials, and a way to run it in a thread."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from . import access, files, repos
from .faults import Control, Fault
from .keys import CONTROL, PENDING, STORE
from .store import Store

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LARGEST_BODY = 2 * 1024**3


@web.middleware
async def through(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Fault, then credentials, then the handler; one log line each."""
    if request.path in ("/_control", "/healthz"):
        return await handler(request)
    control, who = request.app[CONTROL], access.caller(request)
    fault = control.take(request.method, request.path)
    if fault:
        await asyncio.sleep(fault.delay_seconds)
    try:
        if fault and fault.status is not None and not fault.lost:
            raise access.Refused(fault.status, fault.message)
        access.check_credentials(who)
        response = await handler(request)
        if fault and fault.status is not None:
            raise access.Refused(fault.status, fault.message)
    except access.Refused as refusal:
        response = refusal.response()
    except web.HTTPNotFound:
        response = (
            access.repo_not_found(who)
            if "/resolve/" in request.path or "/api/" in request.path
            else access.entry_not_found()
        ).response()
    control.log(request.method, request.path, response.status, who.role)
    return response


async def get_control(request: web.Request) -> web.Response:
    return web.json_response(request.app[CONTROL].view())


async def put_control(request: web.Request) -> web.Response:
    """PUT replaces the faults, POST adds to them."""
    try:
        fault = Fault(**await request.json())
    except TypeError as error:
        return web.json_response({"error": str(error)}, status=400)
    control = request.app[CONTROL]
    control.faults = [fault] if request.method == "PUT" else [*control.faults, fault]
    return await get_control(request)


async def delete_control(request: web.Request) -> web.Response:
    request.app[CONTROL].clear()
    return await get_control(request)


async def healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def application(store: Store) -> web.Application:
    app = web.Application(middlewares=[through], client_max_size=LARGEST_BODY)
    app[STORE], app[CONTROL], app[PENDING] = store, Control(), set()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/_control", get_control)
    app.router.add_put("/_control", put_control)
    app.router.add_post("/_control", put_control)
    app.router.add_delete("/_control", delete_control)
    app.add_routes(repos.routes)
    app.add_routes(files.routes)
    return app


class Running:
    """The server in a thread of this process, as a context: `with Running(folder) as hub: HfApi(endpoint=hub.url)`."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="hub")
        self._app = application(self.store)

    @property
    def control(self) -> Control:
        return self._app[CONTROL]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
