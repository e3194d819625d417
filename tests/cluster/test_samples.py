"""What the pages offer besides jobs (a pod, a network policy, ...) is what a real API server takes, strictly."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from cases.pages import blocks

from luthier_api.kinds import JobKind

pytestmark = pytest.mark.cluster
SAMPLES = [
    (str(block), document)
    for block in blocks()
    for document in block.documents()
    if document.get("kind", JobKind.GENERATE) not in set(JobKind)
]


@pytest.mark.parametrize(("where", "document"), SAMPLES, ids=[where for where, _ in SAMPLES])
def test_sample(cluster: None, where: str, document: dict[str, Any]) -> None:
    arguments = ["kubectl", "create", "--dry-run=server", "--validate=strict", "--namespace", "default", "-f", "-"]
    done = subprocess.run(arguments, input=json.dumps(document), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
