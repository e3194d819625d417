"""Versions that stand in commands and messages, each once. A test holds the chart and the pages against them."""

from __future__ import annotations

from importlib.metadata import version

RELEASE = version("luthier")
"""Of Luthier: pyproject.toml is its source. The chart and the images have the same."""
JOBSET = "v0.12.0"
INSTALL_JOBSET = f"kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/{JOBSET}/manifests.yaml"
