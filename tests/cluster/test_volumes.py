"""A claim's folder is found, and its volume comes back empty after the claim is gone."""

import json
from collections.abc import Iterator

import pytest

from cluster import choice
from cluster.local import volumes
from cluster.local.cluster import Local
from cluster.local.shell import kubectl

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(not isinstance(choice.cluster(), Local), reason="other clusters have provisioners of their own"),
]
NAMESPACE, CLAIM = "test-volumes", "result"


@pytest.fixture
def claim() -> Iterator[str]:
    kubectl("create", "namespace", NAMESPACE)
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    item = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": NAMESPACE},
        "spec": spec,
    }
    kubectl("create", "-f", "-", input=json.dumps(item))
    kubectl("-n", NAMESPACE, "wait", f"pvc/{CLAIM}", "--for=jsonpath={.status.phase}=Bound", "--timeout=30s")
    yield CLAIM
    kubectl("delete", "namespace", NAMESPACE)


def test_a_released_volume_is_wiped_and_offered_again(claim: str) -> None:
    folder = volumes.volume(NAMESPACE, claim)
    (folder / "adapter").mkdir()
    (folder / "adapter/model.safetensors").write_bytes(b"weights")
    name = f"local-{folder.name}"
    kubectl("-n", NAMESPACE, "delete", "pvc", claim)
    kubectl("wait", f"pv/{name}", "--for=jsonpath={.status.phase}=Released", "--timeout=30s")
    assert name in volumes.recycle()
    kubectl("wait", f"pv/{name}", "--for=jsonpath={.status.phase}=Available", "--timeout=30s")
    assert list(folder.iterdir()) == []
    assert oct(folder.stat().st_mode) == "0o42775"
