"""The chain of examples/rewards on the cluster: answers, a judge, and a model that learns from it and from code.

The rows and the code come from a config map.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e import jobs
from e2e.conftest import TOP
from e2e.kube import Kube, condition

pytestmark = pytest.mark.e2e
EXAMPLE = TOP / "examples/rewards"
CODE = """
import glob, os

def readable(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""

def plain(completions, answer, **_):
    for path in [*glob.glob("/proc/[0-9]*/environ")]:
        assert b"HF_TOKEN=" not in readable(path), f"{path} has the token of the Hub"
    return [float(len(text.split()) == 1) for text in completions]
"""
SHORT: dict[str, dict[str, Any]] = {
    "1-answers.yaml": {"training": {"maxSteps": 20, "warmupSteps": 2}},
    "2-judge.yaml": {"training": {"maxSteps": 8}},
    "3-improved.yaml": {
        "training": {"maxSteps": 2, "logSteps": 1},
        "hub": {"tokenSecretRef": {"name": "hub-token", "key": "token"}},
    },
}
PYTHON = {"type": "python", "file": "/data/code.py", "function": "plain", "columns": ["answer"]}


def test_from_answers_over_a_judge_to_better_answers(kube: Kube, tmp_path: Path) -> None:
    """As a chain that is applied at once. The code of a reward looks for the token that the pods of `prepare` hold."""
    runpy.run_path(str(EXAMPLE / "data.py"))["main"](tmp_path)
    rows = {file.name: file.read_text() for file in tmp_path.glob("*.jsonl")}
    kube.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "sums"}, "data": rows | {"code.py": CODE}}
    )
    chain = []
    for name, changes in SHORT.items():
        document = yaml.safe_load((EXAMPLE / name).read_text())
        spec = document["spec"]
        spec |= changes | {"training": spec["training"] | changes["training"], "resources": jobs.CPU}
        spec |= {"workspace": jobs.WORK, "volumes": [{"configMap": "sums", "mountPath": "/data"}]}
        chain.append(document)
    chain[2]["spec"]["grpo"]["rewards"].append(PYTHON)
    kube.apply(*chain)

    for document in chain[:2]:
        kube.complete("ftj", document["metadata"]["name"])
    improved = kube.complete("ftj", "improved")
    metrics = improved["status"]["metrics"]
    assert {"reward.exactMatch", "reward.model", "reward.python", "kl"} <= metrics.keys()
    assert condition(improved, "Trained") == "True"
    (said,) = (text for text in improved["status"]["notices"] if "the pods run plain of /data/code.py" in text)
    assert said.startswith("spec.grpo.rewards[2]")
