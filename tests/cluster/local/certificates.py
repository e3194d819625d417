"""Certificates and kubeconfigs, made anew at every start: three authorities, and one client for each component."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .shell import API, NODE, NODE_IP, STATE, sh

DAYS = "30"  # longer than any cluster lives: `up` makes new ones
PKI = STATE / "pki"
USERS = {
    "admin": "/O=system:masters/CN=admin",
    "kube-controller-manager": "/CN=system:kube-controller-manager",
    "kube-scheduler": "/CN=system:kube-scheduler",
    "kube-proxy": "/CN=system:kube-proxy",
    "kubelet": f"/O=system:nodes/CN=system:node:{NODE}",
    "coredns": "/CN=coredns",
}


def certificates() -> None:
    PKI.mkdir(parents=True, exist_ok=True)
    for authority in ("server-ca", "client-ca", "front-proxy-ca"):
        make_authority(authority)
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    addresses = [f"DNS:{name}" for name in names] + ["IP:127.0.0.1", f"IP:{NODE_IP}", "IP:10.96.0.1"]
    make_certificate("server-ca", "apiserver", "/CN=kube-apiserver", "serverAuth", addresses)
    make_certificate("client-ca", "apiserver-kubelet", "/O=kubelet-readers/CN=kube-apiserver")
    make_certificate("front-proxy-ca", "front-proxy", "/CN=system:auth-proxy")
    openssl("genrsa", "-out", "service-accounts.key", "2048")
    for user, subject in USERS.items():
        make_certificate("client-ca", user, subject)
        kubeconfig(user)


def openssl(*args: str) -> None:
    sh("openssl", *args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=PKI)


def make_authority(name: str) -> None:
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key")
    openssl("req", "-x509", *key, "-days", DAYS, "-subj", f"/CN={name}", "-out", f"{name}.crt")


def make_certificate(
    authority: str, name: str, subject: str, usage: str = "clientAuth", addresses: Sequence[str] = ()
) -> None:
    extensions = f"extendedKeyUsage={usage}\n" + (f"subjectAltName={','.join(addresses)}\n" if addresses else "")
    (PKI / f"{name}.ext").write_text(extensions)
    openssl(
        "req",
        "-new",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        subject,
        "-keyout",
        f"{name}.key",
        "-out",
        f"{name}.csr",
    )
    signer = ("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-CAcreateserial")
    openssl(
        "x509", "-req", "-in", f"{name}.csr", *signer, "-days", DAYS, "-extfile", f"{name}.ext", "-out", f"{name}.crt"
    )


def kubeconfig(user: str) -> Path:
    path = STATE / f"{user}.kubeconfig"
    cluster = {"server": API, "certificate-authority": str(PKI / "server-ca.crt")}
    credentials = {"client-certificate": str(PKI / f"{user}.crt"), "client-key": str(PKI / f"{user}.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "local",
        "clusters": [{"name": "local", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": user}}],
    }
    path.write_text(json.dumps(config, indent=1))
    return path
