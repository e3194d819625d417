"""From the start of a pod's container to its first training step, in parts: real pods of the trainer's image, as the
kubelet starts them.

On the local cluster and only where it is up and has the image (`make cluster images`): elsewhere the answer says why
there are no figures. The operator runs as a process and watches one namespace, as in `jobs`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier_trainer.bench.cases import make_model

NAMESPACE, IMAGE = "luthier-bench-pods", "luthier/trainer:dev"
ROUNDS, LIMIT_SECONDS = 3, 300
MARKS = {"built": "training ", "evaluated": "step 0/", "first_step": "step 1/"}
"""Part → what the line of rank 0 begins with that ends it."""
Object = dict[str, Any]


def kubectl(*arguments: str, document: Object | None = None, check: bool = True) -> str:
    text = None if document is None else json.dumps(document)
    return subprocess.run(
        ["kubectl", "-n", NAMESPACE, *arguments], input=text, capture_output=True, text=True, check=check
    ).stdout


def job(name: str) -> Object:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "task": "causal-lm",
            "model": {"path": "/data/model"},
            "method": {"type": "lora", "rank": 8},
            "dataset": {"files": ["/data/text.txt"], "split": "train[:90%]", "evalSplit": "train[90%:]"},
            "training": {"maxSteps": 100_000, "batchSize": 8, "maxLength": 128, "logSteps": 1},
            "resources": {"nodes": 2, "gpusPerNode": 0, "cpu": "200m"},
            "workspace": {"claimName": "data"},
            "volumes": [{"claimName": "data", "mountPath": "/data"}],
        },
    }


def fill(folder: Path) -> None:
    """A small model and text, where the pods see them as /data."""
    from pydoc_data.topics import topics

    make_model("tiny", folder / "model", cpu=True)
    for path in (folder / "model").iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / "text.txt").write_text(
        "\n".join(" ".join(p.split()) for text in topics.values() for p in text.split("\n\n") if len(p) > 80)
    )


def seconds(text: str) -> float:
    """Epoch seconds of Kubernetes' or the runtime's time, which has nanoseconds."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def measure(name: str) -> dict[str, float]:
    """Seconds from rank 0's `startedAt` to each mark in its log."""
    kubectl("create", "-f", "-", document=job(name))
    selector = f"luthier.dev/job={name},luthier.dev/phase=run,batch.kubernetes.io/job-completion-index=0"
    deadline = time.monotonic() + LIMIT_SECONDS
    found: dict[str, float] = {}
    while len(found) < len(MARKS):
        if time.monotonic() > deadline:
            raise SystemExit(f"{name}: no first step after {LIMIT_SECONDS} s\n{kubectl('describe', 'ftj', name)}")
        time.sleep(1)
        for line in kubectl("logs", "-l", selector, "--timestamps", "--tail=200", check=False).splitlines():
            at, _, text = line.partition(" ")
            for part in (part for part, mark in MARKS.items() if text.startswith(mark)):
                found.setdefault(part, seconds(at))
    (pod,) = json.loads(kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
    began = seconds(pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"])
    kubectl("delete", "ftj", name)
    kubectl("wait", "--for=delete", "pods", "-l", f"luthier.dev/job={name}", "--timeout=90s")
    return {part: at - began for part, at in found.items()}


def main() -> Object:
    from cluster import choice
    from cluster.local import control_plane
    from cluster.local.cluster import Local, environment
    from cluster.local.shell import REGISTRY, answers

    ours = choice.cluster()
    if not isinstance(ours, Local) or not answers(control_plane.api_server_answers):
        return {"skipped": "it measures pods of the local cluster, which is not up: make cluster images"}
    os.environ.update(environment())
    try:
        ours.image_size(IMAGE)
    except SystemExit as missing:
        return {"skipped": f"{missing} (make images)"}
    if json.loads(kubectl("get", "deployments", "-A", "-l", "app.kubernetes.io/name=luthier", "-o", "json"))["items"]:
        return {
            "skipped": (
                "an operator is installed, which would run the benchmark's jobs, too: helm uninstall luthier"
                " --namespace luthier-system"
            )
        }
    top = Path(__file__).resolve().parents[2]
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(top / "crds"))
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=180s")
    ours.recycle()
    kubectl("create", "namespace", NAMESPACE)
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "5Gi"}}}
    kubectl(
        "create",
        "-f",
        "-",
        document={"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim},
    )
    kubectl("wait", "pvc/data", "--for=jsonpath={.status.phase}=Bound", "--timeout=30s")
    fill(ours.volume(NAMESPACE, "data"))
    variables = {
        "LUTHIER_METRICS_PORT": "18080",
        "LUTHIER_NAMESPACES": NAMESPACE,
        "LUTHIER_LOG_LEVEL": "WARNING",
        "LUTHIER_TRAINER_IMAGE": f"{REGISTRY}/{IMAGE}",
        "LUTHIER_GRACE_SECONDS": "15",
    }
    operator = subprocess.Popen([sys.executable, "-m", "luthier_cli", "operator"], env=os.environ | variables)
    try:
        rounds = [measure(f"start-{i}") for i in range(ROUNDS)]
    finally:
        operator.terminate()
        operator.wait()
        kubectl("delete", "namespace", NAMESPACE, "--timeout=180s")
    each = {part: [round(found[part], 1) for found in rounds] for part in MARKS}
    return {
        "pods": 2,
        "seconds_from_started_at": {
            part: {"rounds": values, "median": statistics.median(values)} for part, values in each.items()
        },
    }
