"""What the images are: small enough to be pulled by many nodes, without a compiler, and of a user that is not root."""

from __future__ import annotations

import json

import pytest
from cluster import choice
from cluster.local.cluster import Local
from e2e.conftest import Images, restricted_pod
from e2e.kube import Kube

pytestmark = pytest.mark.e2e
# Compressed, of the CPU build; what lies on the local bases is counted with them.
LIMITS = {"operator": 200, "trainer": 550}  # MB
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "ld", "as", "make", "ninja", "nvcc")
LOOK = f"for c in {' '.join(COMPILERS)}; do command -v $c; done; echo user $(id -u)"


@pytest.mark.skipif(
    not isinstance(choice.cluster(), Local),
    reason="only the local cluster has a registry that says how large an image is",
)
@pytest.mark.parametrize("target", LIMITS)
def test_size(images: Images, target: str) -> None:
    found = json.loads(choice.cluster().image_size(getattr(images, target)))
    print(found)
    assert found["megabytes"] < LIMITS[target]


@pytest.mark.parametrize("target", LIMITS)
def test_no_compiler_and_not_root(kube: Kube, images: Images, target: str) -> None:
    """The pod names no user: the kubelet itself refuses an image of root."""
    name = f"look-into-{target}"
    kube.apply(restricted_pod(name, getattr(images, target), ["sh", "-c", LOOK]))
    kube.until("pod", name, lambda o: o["status"].get("phase") == "Succeeded", timeout=180, what="at its end")
    assert kube.run("logs", name).splitlines() == ["user 1000"]
    kube.delete("pod", name)
