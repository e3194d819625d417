"""What each write of a job costs the API server: how long it takes, kind by kind, with nobody else at work.

So many are in flight that the API server's CPU is the limit: the times add up to what a job costs, whoever writes.
`PYTHONPATH=tests python -m perf.writes --jobs 300`, in a cluster as `perf.jobs` needs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perf.jobs import HERE, check_alone, children_of, clean, job, kubectl

from luthier_api.kinds import parse_job
from luthier_operator.client import RESOURCES, Client, login
from luthier_operator.decide import decide
from luthier_operator.model import Object, Observed
from luthier_operator.settings import Settings

EVENT = {"type": "Normal", "reason": "Bench", "message": "a message", "source": {"component": "bench"}}
MILLISECONDS = 1000


async def milliseconds(write: Callable[[Any], Awaitable[Object]], inputs: Sequence[Any]) -> tuple[float, list[Object]]:
    """Milliseconds a write, with all in flight that the client sends at once; and the answers."""
    begin = time.monotonic()
    answers = await asyncio.gather(*map(write, inputs))
    return round(MILLISECONDS * (time.monotonic() - begin) / len(inputs), 2), list(answers)


async def measure(count: int) -> dict[str, float]:
    client, settings = Client(await login()), Settings(trainer_image="registry.example/trainer")
    names = [f"bench-{i:05}" for i in range(count)]
    first, second = children_of(names, HERE)
    found: dict[str, float] = {}

    found["create FineTuneJob"], jobs = await milliseconds(client.create, [job(name) for name in names])
    statuses = [
        decide(Observed(parse_job(made), children={}, pods=[], ended=[]), settings, datetime.now(UTC)).status.dump()
        for made in jobs
    ]

    async def patch(pair: tuple[Object, Object]) -> Object:
        return await client.patch_status(*pair)

    found["patch its status"], jobs = await milliseconds(patch, list(zip(jobs, statuses, strict=True)))
    for kind, manifests in (
        ("ConfigMap", [m for m in first if m["kind"] == "ConfigMap"]),
        ("Job", [m for m in first if m["kind"] == "Job"]),
        ("JobSet", second),
    ):
        found[f"create {kind}"], _ = await milliseconds(client.create, manifests)
    paths = [RESOURCES["ConfigMap"].path(HERE, m["metadata"]["name"]) for m in first if m["kind"] == "ConfigMap"]
    found["get ConfigMap"], _ = await milliseconds(client.get, paths)
    found["create Event"], _ = await milliseconds(client.create, [event(made) for made in jobs])
    await client.close()
    return found


def event(about: Object) -> Object:
    meta = about["metadata"]
    reference = {"kind": about["kind"], "namespace": HERE, "name": meta["name"], "uid": meta["uid"]}
    head = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": f"{meta['name']}.0", "namespace": HERE}}
    return head | EVENT | {"involvedObject": reference}


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parts = parser.parse_args(arguments)

    from cluster import choice

    os.environ.update(choice.cluster().ensure())
    choice.cluster().check_free()
    check_alone()
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(Path(__file__).resolve().parents[2] / "crds"))
    clean()
    kubectl("create", "namespace", HERE)
    try:
        return {"milliseconds_a_write": asyncio.run(measure(parts.jobs))}
    finally:
        clean()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
