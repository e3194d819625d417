"""What each write of a job costs the API server, in milliseconds of its CPU, as it reports that itself (/metrics).

Nobody else may use the API server meanwhile. `PYTHONPATH=tests python -m perf.writes --jobs 300`, in a cluster as
`perf.jobs` needs it, with one API server.
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
PUBLISHED_SECONDS = 20  # the API server publishes the schemas of new CRDs in the background


def cpu_seconds() -> float:
    """CPU seconds of the API server so far."""
    lines = kubectl("get", "--raw", "/metrics").splitlines()
    return float(next(line for line in lines if line.startswith("process_cpu_seconds_total ")).split()[1])


async def costs(write: Callable[[Any], Awaitable[Object]], inputs: Sequence[Any]) -> tuple[float, list[Object]]:
    """Milliseconds a write, and the answers. What reading the metrics itself costs is subtracted."""
    idle = [cpu_seconds() for _ in range(3)]
    answers = await asyncio.gather(*map(write, inputs))
    spent = cpu_seconds() - idle[-1] - (idle[-1] - idle[0]) / 2
    return round(MILLISECONDS * spent / len(inputs), 2), list(answers)


async def measure(count: int) -> dict[str, float]:
    client, settings = Client(await login()), Settings(trainer_image="registry.example/trainer")
    names = [f"bench-{i:05}" for i in range(count)]
    first, second = children_of(names, HERE)
    found: dict[str, float] = {}

    await client.create(job("bench-first"))  # the API server compiles the rules of a changed CRD at its first use
    found["create FineTuneJob"], jobs = await costs(client.create, [job(name) for name in names])
    statuses = [
        decide(Observed(parse_job(made), children={}, pods=[], ended=[]), settings, datetime.now(UTC)).status.dump()
        for made in jobs
    ]

    async def patch(pair: tuple[Object, Object]) -> Object:
        return await client.patch_status(*pair)

    found["patch its status"], jobs = await costs(patch, list(zip(jobs, statuses, strict=True)))
    configs = [manifest for manifest in first if manifest["kind"] == "ConfigMap"]
    found["create ConfigMap"], _ = await costs(client.create, configs)
    paths = [RESOURCES["ConfigMap"].path(HERE, manifest["metadata"]["name"]) for manifest in configs]
    found["get ConfigMap"], _ = await costs(client.get, paths)
    found["create Event"], _ = await costs(client.create, [event(made) for made in jobs])
    found["create JobSet"], _ = await costs(client.create, second)
    # Last, because the Job controller begins with them.
    found["create Job"], _ = await costs(client.create, [manifest for manifest in first if manifest["kind"] == "Job"])
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
    time.sleep(PUBLISHED_SECONDS)
    try:
        found = asyncio.run(measure(parts.jobs))
        print(json.dumps(found), file=sys.stderr, flush=True)  # to remove the jobs takes longer
        return {"cpu_ms_of_the_api_server": found}
    finally:
        clean()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
