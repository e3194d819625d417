"""Folders and addresses of the local cluster, and how its processes are run: what every other file here needs."""

import contextlib
import os
import signal
import ssl
import subprocess
import textwrap
import time
import urllib.request
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


def fetch(url: str) -> int:
    """Status of a GET. The certificates of controllers and scheduler are signed by themselves. Raises OSError."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(url, timeout=5, context=context) as answer:
        status: int = answer.status
        return status


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


def alive(name: str) -> bool:
    """Whether the component that `start` has started still runs."""
    path = STATE / f"{name}.pid"
    return path.exists() and running(int(path.read_text()), name)


def answers(probe: Callable[[], object]) -> bool:
    """Whether `probe` returns something true now. What it raises while a component starts counts as no."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError, LookupError):
        return bool(probe())
    return False


def wait(what: str, probe: Callable[[], object], seconds: float = 120) -> None:
    """Returns once `probe` answers. Raises TimeoutError with the last lines of the component's log."""
    deadline = time.monotonic() + seconds
    while not answers(probe):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} is not ready after {seconds:.0f} s{last_lines(what)}")
        time.sleep(0.2)


def last_lines(name: str, count: int = 10) -> str:
    path = STATE / f"{name}.log"
    if not path.exists():
        return f": read {STATE}/*.log"
    return f". The end of {path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-count:])
