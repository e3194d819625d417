"""A style that is learnt and then drawn by three shards, of which two lose their pods and one is given a row that
cannot be drawn: what lies on the Hub is whole, and equal to what one shard draws without any loss.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from e2e import jobs
from e2e.kube import Kube, Object
from hub import manifests as hub_manifests

pytestmark = pytest.mark.e2e

ROWS, POISONED = 60, 31
REPO = "luthier/pictures"
STYLE = jobs.fine_tune(
    "style",
    task="text-to-image",
    model={"path": "/data/sdxl"},
    dataset={"files": ["/data/captioned"], "format": "imagefolder"},
    image={"resolution": 32},
    method={"type": "lora", "rank": 4, "targetModules": ["to_q", "to_k", "to_v", "to_out.0"]},
    training=jobs.course(maxSteps=20, batchSize=4, learningRate=0.01),
)
PROMPTS = [f"the digit {i % 10}, study {i}" if i != POISONED else "digit " * 100 for i in range(ROWS)]


def pictures(name: str, **spec: object) -> Object:
    return jobs.generate(
        name,
        task="text-to-image",
        model={"path": "/data/sdxl"},
        adapters=[{"job": "style"}],
        batchSize=2,
        inputs={"rows": [{"prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS)]},
        image={"scheduler": "euler", "steps": 20, "width": 64, "height": 64, "guidance": 5.0},
        **spec,
    )


def folder(job: Object) -> str:
    return f"/workspace/{job['status']['workspace']['folder']}"


def rows(kube: Kube, job: Object) -> dict[int, Object]:
    """Lines of the result by row, each of which is there once."""
    text = kube.run("exec", "inspector", "--", "sh", "-c", f"cat {folder(job)}/result/*/metadata.jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(ROWS))
    return {line["row"]: line for line in lines}


def evict(kube: Kube, pod: Object) -> None:
    """As `kubectl drain` does."""
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    kube.run("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


def test_shards_that_lose_their_pods_draw_what_one_draws(kube: Kube, system: Kube) -> None:
    many = pictures("pictures", shards=3, hub=jobs.HUB | {"repo": REPO})
    kube.apply(STYLE, many, pictures("pictures-alone"))
    job = kube.until(
        "gj",
        "pictures",
        lambda o: (o["status"].get("progress") or {}).get("rows", 0) >= 6,
        timeout=600,
        what="at six rows",
    )
    journals = f"ls {folder(job)}/shards/*/*/journal.jsonl | wc -l"
    deadline = time.monotonic() + 120
    while int(kube.run("exec", "inspector", "--", "sh", "-c", journals)) < 3:
        assert time.monotonic() < deadline, kube.run("describe", "gj", "pictures")
        time.sleep(0.5)
    killed, evicted, _ = sorted(
        kube.list("pods", "luthier.dev/job=pictures,luthier.dev/phase=run"), key=lambda pod: pod["metadata"]["name"]
    )
    assert (killed["status"]["phase"], evicted["status"]["phase"]) == ("Running", "Running")
    kube.delete("pod", killed["metadata"]["name"], "--grace-period=0", "--force")
    evict(kube, evicted)
    job = kube.complete("gj", "pictures")
    assert (job["status"]["progress"]["rows"], job["status"]["progress"]["failedRows"]) == (ROWS, 1)
    table = kube.run("get", "gj", "pictures")
    assert re.search(r"NAME\s+STATE\s+ROWS\s+OF\s+FAILED\s+RATE\s+ETA\s+SHARDS×GPUS\s+AGE", table)
    assert re.search(rf"pictures\s+Complete\s+{ROWS}\s+{ROWS}\s+1\s", table)

    found = rows(kube, job)
    assert [i for i, line in found.items() if line["error"]] == [POISONED]
    assert "image.longPrompts: chunk" in found[POISONED]["error"]
    alone = rows(kube, kube.complete("gj", "pictures-alone"))
    drawn = {i: line["sha256"] for i, line in found.items() if i != POISONED}
    assert drawn == {i: line["sha256"] for i, line in alone.items() if i != POISONED}

    files = hub_manifests.tree(system, REPO, job["status"]["hub"]["revision"], kind="dataset")
    published = [file["lfs"]["oid"] for file in files if file["path"].endswith(".png")]
    assert sorted(published) == sorted(drawn.values())
