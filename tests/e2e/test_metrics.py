"""Prometheus text of the operator and of a training pod: it parses, and holds every metric that the documentation names."""

from __future__ import annotations

import pytest
from e2e import jobs
from e2e.conftest import SYSTEM
from e2e.kube import Kube
from prometheus_client.parser import text_string_to_metric_families

from luthier_api.metrics import POD_METRICS
from luthier_operator.metrics import OPERATOR_METRICS

pytestmark = pytest.mark.e2e
FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


def families(kube: Kube, url: str) -> set[str]:
    return {f.name for f in text_string_to_metric_families(kube.python("inspector", FETCH, url))}


def test_a_training_pod_serves_what_the_documentation_names(kube: Kube) -> None:
    kube.apply(jobs.BASE)
    kube.complete("ftj", "base")
    kube.apply(jobs.fine_tune("measured", model={"job": "base"}, dataset=jobs.REGISTER, method={"type": "lora", "rank": 2},
                              training=jobs.training(maxSteps=5000, saveSteps=50)))  # fmt: skip
    kube.until("ftj", "measured", lambda o: (o["status"].get("checkpoint") or {}).get("step"), timeout=300, what="at a checkpoint")
    pod = kube.list("pods", "luthier.dev/job=measured,luthier.dev/phase=run")[0]
    found = families(kube, f"http://{pod['status']['podIP']}:9464/metrics")
    # A counter of what has not happened is not there.
    expected = {m.name.removesuffix("_total") for m in POD_METRICS if not m.name.startswith("luthier_generate") and "nonfinite" not in m.name}
    assert expected - found == set()
    kube.delete("ftj", "measured")


def test_the_operator_serves_what_the_documentation_names(kube: Kube) -> None:
    found = families(kube, f"http://luthier-metrics.{SYSTEM}.svc:8080/metrics")
    assert {m.name.removesuffix("_total") for m in OPERATOR_METRICS} - found == set()
