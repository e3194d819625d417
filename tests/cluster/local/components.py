"""The programs of the cluster, compiled from Go modules: no release archive and no registry has to be reachable.

The control plane, the node's agents, etcd and kubectl are one binary (`../kube`), told apart by the name it is called
by.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier_operator import versions

from .progress import Progress
from .shell import BIN, HOME, out, sh

PACKAGES = [
    "buildah",
    "ca-certificates",
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "debootstrap",
    "ethtool",
    "gcc",
    "iproute2",
    "iptables",
    "libc6-dev",
    "openssl",
    "procps",
    "runc",
    "socat",
]
KUBERNETES = "v1.35.4"
HYPERKUBE = Path(__file__).resolve().parents[1] / "kube"
COMPONENTS = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl", "etcd"]
JOBSET = ("sigs.k8s.io/jobset", versions.JOBSET)
KUEUE = ("sigs.k8s.io/kueue", "v0.19.2")
MODULES = {  # binary: (module, version, package)
    "jobset": (*JOBSET, "."),
    "helm": ("helm.sh/helm/v3", "v3.21.4", "./cmd/helm"),
    "coredns": ("github.com/coredns/coredns", "v1.14.7", "."),
    "registry": ("github.com/distribution/distribution/v3", "v3.1.2", "./cmd/registry"),
    "kueue": (*KUEUE, "./cmd/kueue"),
}
COREDNS_PLUGINS = (
    "bind",
    "cache",
    "errors",
    "kubernetes",
)  # those of the Corefile; all of them take eight times as long
STATIC = os.environ | {"CGO_ENABLED": "0"}  # the binaries of scratch images have no C library beside them
GIB_PER_COMPILER = 2  # at most, seen with the packages of Kubernetes


def install_packages() -> None:
    """Installs what is missing, and upgrades nothing."""
    known = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Status}\n", *PACKAGES], text=True, capture_output=True
    ).stdout
    missing = sorted(
        set(PACKAGES) - {line.split()[0] for line in known.splitlines() if line.endswith("install ok installed")}
    )
    if missing:
        sh("apt-get", "update", "-q")
        sh("apt-get", "install", "-q", "-y", "--no-install-recommends", "--no-upgrade", *missing)


def module_dir(module: str, version: str) -> Path:
    return Path(json.loads(out("go", "mod", "download", "-json", f"{module}@{version}", cwd="/"))["Dir"])


def build() -> None:
    """Compiles what is not there yet in the version that is asked for."""
    BIN.mkdir(parents=True, exist_ok=True)
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(HYPERKUBE.iterdir())))
    with built("hyperkube", f"{KUBERNETES} {sources.hexdigest()}") as missing:
        if missing:
            flags = f"-s -w {version_flags()}"
            go_build("hyperkube", HYPERKUBE, "-ldflags", flags, "-o", BIN / "hyperkube", ".")
    for name in COMPONENTS:
        if not (BIN / name).is_symlink():
            (BIN / name).symlink_to("hyperkube")
    for name, (module, version, package) in MODULES.items():
        parts = " ".join(COREDNS_PLUGINS) if name == "coredns" else ""
        with built(name, f"{module} {version} {parts}".strip()) as missing:
            if missing:
                build_module(name, module_dir(module, version), package)


@contextmanager
def built(name: str, version: str) -> Iterator[bool]:
    """Whether `name` has to be compiled, which the block then does: a file beside the binaries says of which version it
    is.
    """
    note = BIN / f".{name}.version"
    missing = not (BIN / name).exists() or not note.exists() or note.read_text() != version
    yield missing
    if missing:
        note.write_text(version)


def build_module(name: str, downloaded: Path, package: str) -> None:
    """The module cache is read-only and a `vendor` folder may be incomplete in it: build in a copy, without."""
    source = HOME / "src" / name
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(downloaded, source)
    sh("chmod", "-R", "u+w", source)
    shutil.rmtree(source / "vendor", ignore_errors=True)
    if name == "coredns":
        choose_plugins(source)
    go_build(name, source, "-mod=mod", "-ldflags", "-s -w", "-o", BIN / name, package)
    shutil.rmtree(source)


def choose_plugins(source: Path) -> None:
    """The file that CoreDNS itself generates from its `plugin.cfg`: which plugins are compiled in."""
    imports = "\n".join(f'import _ "github.com/coredns/coredns/plugin/{name}"' for name in COREDNS_PLUGINS)
    (source / "core/plugin/zplugin.go").write_text(f"package plugin\n\n{imports}\n")


def go_build(name: str, folder: Path, *arguments: object) -> None:
    """`go build`, with the number of packages every half minute. Raises CalledProcessError after the errors."""
    progress = Progress(f"compile {name}")
    command = ["go", "build", "-v", f"-p={compilers()}", "-trimpath", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, env=STATIC, text=True, stderr=subprocess.PIPE)
    assert process.stderr
    errors, packages = [], 0
    for line in process.stderr:
        if line.startswith("go: downloading"):
            progress.still(line.removeprefix("go: ").strip())
        elif " " in line:
            errors.append(line)
        else:
            packages += 1
            progress.still(f"{packages} packages")
    if process.wait():
        sys.stderr.writelines(errors)
        raise subprocess.CalledProcessError(process.returncode, command)
    progress.done(f"{packages} packages")


def compilers() -> int:
    """How many compilers run at once: one a core, unless there is too little memory for so many."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib / GIB_PER_COMPILER)))


def version_flags() -> str:
    """Without a version stamped in, kubelet and API server refuse each other."""
    stamp = {
        "gitVersion": KUBERNETES,
        "gitMajor": "1",
        "gitMinor": KUBERNETES.split(".")[1],
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
        "buildDate": "2026-01-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(f"-X {package}.{key}={value}" for package in packages for key, value in stamp.items())
