"""etcd, the API server (with an audit log), controllers and scheduler, as processes of this machine."""

import subprocess

from .certificates import PKI
from .shell import API, BIN, NODE_IP, STATE, fetch, kubectl, start, write

SERVICE_NET = "10.96.0.0/16"
ETCD, ETCD_PEER = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
# Each request with its user and verb, and no bodies: what counts the API calls of an operator.
AUDIT_POLICY = """
    apiVersion: audit.k8s.io/v1
    kind: Policy
    omitStages: [RequestReceived]
    rules: [{level: Metadata}]
"""


def etcd() -> None:
    start(
        "etcd",
        BIN / "etcd",
        f"--data-dir={STATE}/etcd",
        "--unsafe-no-fsync",  # the state does not outlive the machine
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        f"--listen-peer-urls={ETCD_PEER}",
        f"--initial-advertise-peer-urls={ETCD_PEER}",
        f"--initial-cluster=default={ETCD_PEER}",
    )


def etcd_answers() -> bool:
    return fetch(f"{ETCD}/health") == 200


def api_server() -> None:
    start(
        "kube-apiserver",
        BIN / "kube-apiserver",
        f"--etcd-servers={ETCD}",
        f"--bind-address={NODE_IP}",
        f"--advertise-address={NODE_IP}",
        f"--secure-port={API.rsplit(':', 1)[1]}",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--client-ca-file={PKI}/client-ca.crt",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-cluster-ip-range={SERVICE_NET}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={PKI}/service-accounts.key",
        f"--service-account-signing-key-file={PKI}/service-accounts.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--requestheader-allowed-names=system:auth-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={PKI}/front-proxy.crt",
        f"--proxy-client-key-file={PKI}/front-proxy.key",
        "--enable-aggregator-routing=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={write('audit.yaml', AUDIT_POLICY)}",
        f"--audit-log-path={STATE}/audit.log",
        "--audit-log-maxsize=2000",  # MB: tests read it whole, and by itself it is begun anew at 100
    )


def api_server_answers() -> bool:
    return kubectl("get", "--raw", "/readyz", "--request-timeout=5s", stderr=subprocess.DEVNULL) == "ok"


def kubelet_readers() -> None:
    """The API server may read logs of the kubelet and run commands through it."""
    role = ("--clusterrole=system:kubelet-api-admin", "--group=kubelet-readers")
    kubectl("create", "clusterrolebinding", "kubelet-readers", *role)


def kubelet_readers_exist() -> bool:
    return bool(kubectl("get", "clusterrolebinding", "kubelet-readers", stderr=subprocess.DEVNULL))


def options(name: str) -> list[str]:
    """Those of controllers and scheduler."""
    kubeconfig = f"{STATE}/{name}.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]


def controllers() -> None:
    start(
        "kube-controller-manager",
        BIN / "kube-controller-manager",
        *options("kube-controller-manager"),
        f"--service-account-private-key-file={PKI}/service-accounts.key",
        f"--root-ca-file={PKI}/server-ca.crt",
        f"--cluster-signing-cert-file={PKI}/client-ca.crt",
        f"--cluster-signing-key-file={PKI}/client-ca.key",
        "--use-service-account-credentials",
        "--node-monitor-grace-period=20s",
    )


def controllers_answer() -> bool:
    return fetch("https://127.0.0.1:10257/healthz") == 200


def scheduler() -> None:
    start("kube-scheduler", BIN / "kube-scheduler", *options("kube-scheduler"))


def scheduler_answers() -> bool:
    return fetch("https://127.0.0.1:10259/readyz") == 200
