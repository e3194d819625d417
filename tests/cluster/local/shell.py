"""Folders and addresses of the local cluster, and how its processes are run: what every other file here needs."""

import contextlib
import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache/cluster"))
BIN, STATE = HOME / "bin", HOME / "state"
KUBECONFIG = STATE / "admin.kubeconfig"

NODE, NODE_IP = "node-1", "10.244.0.1"
API = f"https://{NODE_IP}:6443"
REGISTRY = f"{NODE_IP}:5000"


def sh(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in args], check=True, text=True, **options)


def out(*args: object, **options: Any) -> str:
    return sh(*args, stdout=subprocess.PIPE, **options).stdout


def kubectl(*args: object, **options: Any) -> str:
    return out(BIN / "kubectl", "--kubeconfig", KUBECONFIG, *args, **options)


def ctr(*args: object, **options: Any) -> str:
    """containerd's own client, in the namespace that the kubelet uses."""
    return out("ctr", "-a", STATE / "containerd.sock", "-n", "k8s.io", *args, **options)


def write(name: str, text: str) -> Path:
    path = STATE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    return path


def start(name: str, *args: object) -> None:
    """Starts a component that outlives this command; `stop` finds it by its pid file."""
    with (STATE / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(a) for a in args], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    (STATE / f"{name}.pid").write_text(str(process.pid))


def stop(name: str) -> None:
    path = STATE / f"{name}.pid"
    if not path.exists():
        return
    pid = int(path.read_text())
    if running(pid, name):
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait(name, lambda: not running(pid, name), seconds=5)
    path.unlink()


def running(pid: int, name: str) -> bool:
    """A pid file outlives a reboot, and the number may be another program's by then. A zombie has no command line."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]).name == name
    return False


def wait(what: str, probe: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if probe():
                return
        time.sleep(0.2)
    raise TimeoutError(f"{what} is not ready after {seconds:.0f} s: read {STATE}/*.log")
