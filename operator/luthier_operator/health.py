"""/metrics, /healthz and /readyz of the operator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST


async def serve(
    port: int, metrics: Callable[[], bytes], alive: Callable[[], bool], ready: Callable[[], bool]
) -> web.AppRunner:
    """Serve until `cleanup` of the returned runner is called.

    `alive`: no task of the operator has ended. `ready`: the first lists are complete, or another replica is the leader.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def probe(check: Callable[[], bool], otherwise: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            good = check()
            return web.Response(status=200 if good else 503, text="ok" if good else otherwise)

        return answer

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", show_metrics),
            web.get("/healthz", probe(alive, "a task of the operator has ended")),
            web.get(
                "/readyz",
                probe(ready, "the first lists are not complete, and no other replica is known to be the leader"),
            ),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
