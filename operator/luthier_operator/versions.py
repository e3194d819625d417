"""Versions in commands and messages. A test compares the chart and the docs with them."""

from __future__ import annotations

from importlib.metadata import version

RELEASE = version("luthier")
"""Version of Luthier, from pyproject.toml. The chart and the images have the same."""
SAME_CHART = "The CRDs and the operator have different versions: install both from the same chart"
JOBSET = "v0.12.0"
INSTALL_JOBSET = f"kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/{JOBSET}/manifests.yaml"
