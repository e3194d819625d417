"""A training on the cluster whose rows are in a bucket of a real S3 server: only `prepare` can read it.

The server runs on this machine, which is the node of the local cluster; elsewhere pods cannot reach it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import versitygw
from cluster import choice
from cluster.local.shell import NODE_IP
from e2e import jobs
from e2e.conftest import JOBS
from e2e.kube import Kube

pytestmark = pytest.mark.e2e
SECRET = {"name": "bucket", "keys": {"accessKeyId": "id", "secretAccessKey": "key"}}
ROWS = [{"text": f"The lute has {i} strings.", "label": ["odd", "even"][i % 2]} for i in range(40)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    if choice.cluster().volume(JOBS, "work") is None:
        pytest.skip("pods of this cluster cannot reach a server on this machine")
    rows = tmp_path / "buckets/chats/2026/rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with versitygw.serving(tmp_path / "buckets", NODE_IP) as port:
        yield f"http://{NODE_IP}:{port}"


def test_a_training_of_rows_in_a_bucket(kube: Kube, server: str) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET["name"]}}
    kube.apply(secret | {"stringData": {"id": versitygw.USER, "key": versitygw.PASSWORD}})
    kube.apply(
        jobs.fine_tune(
            "of-a-bucket",
            model={"path": "/data/encoder"},
            task="text-classification",
            dataset={"files": ["s3://chats/2026/*.jsonl"]},
            stores=[{"type": "s3", "endpoint": server, "region": "us-east-1", "secretRef": SECRET}],
            method={"type": "lora", "rank": 2},
            training=jobs.course(maxSteps=2, maxLength=32),
        )
    )
    job = kube.complete("ftj", "of-a-bucket")
    assert job["status"]["prepared"]["dataset"]["rows"] == len(ROWS)
    assert versitygw.PASSWORD not in json.dumps(job)

    secrets = {
        pod["metadata"]["labels"]["luthier.dev/phase"]: {
            variable["name"]: variable["valueFrom"]["secretKeyRef"]["key"]
            for variable in pod["spec"]["containers"][0]["env"]
            if "secretKeyRef" in variable.get("valueFrom", {})
        }
        for pod in kube.list("pods", "luthier.dev/job=of-a-bucket")
    }
    assert secrets == {"prepare": {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}, "run": {}}
