"""Prometheus text as a scraper reads it, and the tables of docs/metrics.md, which say what should be in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e2e.conftest import SYSTEM
from e2e.kube import Kube, Object
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
POD_PORT, OPERATOR_PORT = 9464, 8080  # as the page and the chart have them
PARTS = {"histogram": ("_bucket", "_sum", "_count")}  # the samples of a family; of the other types, the name alone


@dataclass(frozen=True)
class Documented:
    name: str
    type: str
    labels: frozenset[str]


def documented(table: str) -> list[Documented]:
    """The rows of one table of the page."""
    block = re.search(rf"<!-- table: {table} -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert block, table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block[1].splitlines()[2:]]
    return [
        Documented(name.strip("`"), kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows
    ]


@dataclass(frozen=True)
class Figures:
    """What one address served at one time."""

    families: dict[str, Family]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a gauge or counter, or the count of a histogram, over the samples with these labels; fails where
        there is none.
        """
        family = self.families[name.removesuffix("_total")]
        wanted = f"{name}_count" if family.type == "histogram" else name
        found = [s.value for s in family.samples if s.name == wanted and labels.items() <= s.labels.items()]
        assert found, f"{name}: no sample with {labels}"
        return sum(found)

    def check(self, names: Iterable[Documented], without_samples: Iterable[str] = ()) -> None:
        """Each is served with the type, the samples and the labels of the page, and with finite values."""
        for row in names:
            family = self.families.get(row.name.removesuffix("_total"))
            assert family is not None, f"{row.name}: not served"
            assert family.type == row.type, row.name
            parts = {row.name + part for part in PARTS.get(row.type, ("",))}
            assert {s.name for s in family.samples} == parts or (not family.samples and row.name in without_samples), (
                row.name
            )
            for sample in family.samples:
                assert sample.labels.keys() - {"le"} == row.labels, sample
                assert math.isfinite(sample.value), sample


def served(kube: Kube, url: str) -> Figures:
    return Figures({f.name: f for f in text_string_to_metric_families(kube.python("inspector", FETCH, url))})


def of_pod(kube: Kube, pod: Object) -> Figures:
    return served(kube, f"http://{pod['status']['podIP']}:{POD_PORT}/metrics")


def of_operator(kube: Kube) -> Figures:
    """Of the replica that works."""
    leader = Kube(SYSTEM).leader()
    assert leader is not None
    return served(kube, f"http://{leader['status']['podIP']}:{OPERATOR_PORT}/metrics")


def of_any_operator(kube: Kube) -> Figures:
    """Of whichever replica the Service chooses."""
    return served(kube, f"http://luthier-metrics.{SYSTEM}.svc:{OPERATOR_PORT}/metrics")
