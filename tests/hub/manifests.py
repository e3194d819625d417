"""The Hub in a cluster: its objects, its address, and how a test on the outside speaks with it.

Its code comes from a ConfigMap and is run by the operator's image, so that no image has to be built for it. It passes
Pod Security `restricted`. Its repositories are in an emptyDir: they live as long as the pod.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from .access import READ_TOKEN, WRITE_TOKEN

NAME, PORT = "hub", 8080
CODE = Path(__file__).parent
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/component": "test-hub"}
# Asks the server from inside its own pod: that needs neither a route to the cluster nor a port-forward.
ASK = """
import sys, urllib.request
method, path, body = sys.argv[1:]
headers = {"Authorization": "Bearer TOKEN"}
request = urllib.request.Request("http://127.0.0.1:PORT" + path, body.encode() or None, headers, method=method)
print(urllib.request.urlopen(request).read().decode())
""".replace("TOKEN", WRITE_TOKEN).replace("PORT", str(PORT))


class Kubectl(Protocol):
    def run(self, *arguments: str) -> str:
        """What kubectl prints, in the namespace of the Hub."""


def objects(namespace: str, image: str) -> list[dict[str, Any]]:
    """ConfigMap, Deployment and Service; `image` is any with Python and aiohttp, such as the operator's."""
    return [config_map(namespace), deployment(namespace, image), service(namespace)]


def url(namespace: str) -> str:
    """What HF_ENDPOINT is in the pods of the cluster."""
    return f"http://{NAME}.{namespace}.svc.cluster.local:{PORT}"


def token(kind: str) -> str:
    """One that may `write`, one that may `read`, and a `wrong` one."""
    return {"write": WRITE_TOKEN, "read": READ_TOKEN, "wrong": "hf_wrong"}[kind]


def ask(kubectl: Kubectl, method: str, path: str, body: object = None) -> Any:
    """The server's JSON answer, with the writer's token."""
    text = "" if body is None else json.dumps(body)
    return json.loads(kubectl.run("exec", f"deployment/{NAME}", "--", "python", "-c", ASK, method, path, text))


def control(kubectl: Kubectl, fault: dict[str, object]) -> None:
    """The one fault that holds from now on (`faults`)."""
    ask(kubectl, "PUT", "/_control", fault)


def requests(kubectl: Kubectl) -> list[dict[str, Any]]:
    """What the server has been asked, oldest first."""
    return list(ask(kubectl, "GET", "/_control")["requests"])


def tree(kubectl: Kubectl, repo: str, revision: str, kind: str = "model") -> list[dict[str, Any]]:
    """Files of a repository at a revision: path, size, oid, and `lfs` with the sha256 of large ones."""
    entries = ask(kubectl, "GET", f"/api/{kind}s/{repo}/tree/{revision}?recursive=true")
    return [entry for entry in entries if entry["type"] == "file"]


def metadata(namespace: str) -> dict[str, Any]:
    return {"name": NAME, "namespace": namespace, "labels": LABELS}


def config_map(namespace: str) -> dict[str, Any]:
    code = {path.name: path.read_text() for path in sorted(CODE.glob("*.py"))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(namespace), "data": code}


def deployment(namespace: str, image: str) -> dict[str, Any]:
    container = {
        "name": NAME,
        "image": image,
        "command": ["python", "-m", "hub", "--port", str(PORT), "--root", "/data"],
        "env": [{"name": "PYTHONPATH", "value": "/code"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "code", "mountPath": "/code/hub", "readOnly": True},
            {"name": "data", "mountPath": "/data"},
        ],
    }
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "code", "configMap": {"name": NAME}}, {"name": "data", "emptyDir": {}}],
    }
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": LABELS},
        "template": {"metadata": {"labels": LABELS}, "spec": pod},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(namespace), "spec": spec}


def service(namespace: str) -> dict[str, Any]:
    spec = {"selector": LABELS, "ports": [{"name": "http", "port": PORT, "targetPort": "http"}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(namespace), "spec": spec}
