"""Images without Docker: buildah builds the Dockerfile on Debian bases made with debootstrap, and pushes to the local
registry.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .shell import BIN, HOME, REGISTRY, STATE, ctr, fetch, out, sh, start, write

DEBIAN = "bookworm"
RUNTIME = ["ca-certificates", "libgomp1", "python3"]
# Stand-ins for a public base image, and for the same with compilers: both have the same /usr/bin/python3, so that a
# virtual environment made in the second works in the first.
BASES = {"runtime": RUNTIME, "build": [*RUNTIME, "g++", "ninja-build", "python3-dev", "python3-venv"]}
CERTIFICATES = "/etc/ssl/certs"
MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"


def registry() -> None:
    storage = {"filesystem": {"rootdirectory": str(HOME / "registry")}, "delete": {"enabled": True}}
    config = {"version": 0.1, "http": {"addr": REGISTRY}, "log": {"level": "warn"}, "storage": storage}
    start("registry", BIN / "registry", "serve", write("registry.json", json.dumps(config)))


def registry_answers() -> bool:
    return fetch(f"http://{REGISTRY}/v2/") == 200


def image(context: str, target: str, name: str) -> str:
    """Builds `target` of CONTEXT/Dockerfile for CPU and pushes it: only changed layers travel. Returns the reference
    for pods.
    """
    arguments = {"BASE": base("runtime"), "BUILD_BASE": base("build"), "DS_ACCELERATOR": "cpu"}
    volumes = [f"{CERTIFICATES}:{CERTIFICATES}:ro"]  # this machine may trust an authority that Debian does not know
    wheels = os.environ.get("WHEELS") or os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute():
        volumes.append(f"{wheels}:/wheels:ro")
        arguments["FIND_LINKS"] = "/wheels"
    forget_others(arguments)
    buildah(
        *("build", "--isolation", "chroot", "--network", "host", "--layers", "--target", target, "--tag", name),
        *[option for key, value in arguments.items() for option in ("--build-arg", f"{key}={value}")],
        *[option for volume in volumes for option in ("--volume", volume)],
        context,
    )
    reference = f"{REGISTRY}/{name}"
    compression = ("--compression-format", "zstd", "--compression-level", "1")
    buildah("push", "--tls-verify=false", *compression, name, f"docker://{reference}", stderr=subprocess.DEVNULL)
    return reference


def forget_others(arguments: dict[str, str]) -> None:
    """buildah 1.28 takes a layer from its cache whatever arguments it was made with: torch for CUDA, say, where there
    is a wheel for CPU.

    So those that were made with others than `arguments` are removed, all but the bases; and before them the containers
    that a build which was killed has left, because they hold their layers. The same is done when the disk gets full:
    each build of changed code leaves the layers of the one before, up to 5 GB.
    """
    note, given = HOME / "image-arguments.json", json.dumps(arguments, sort_keys=True)
    if not note.exists() or note.read_text() != given or shutil.disk_usage(HOME).free < NEEDED:
        note.unlink(missing_ok=True)  # until all is removed: this may be killed, too
        buildah("rm", "--all", stdout=subprocess.DEVNULL)
        kept = {i["id"] for i in listed() if any(name.startswith("localhost/local/") for name in i["names"] or ())}
        while others := [i["id"] for i in listed() if i["id"] not in kept]:
            buildah("rmi", "--force", *others, stdout=subprocess.DEVNULL)
        note.write_text(given)


NEEDED = 20 * 2**30
"""Bytes that are free before a build: both images from nothing take up to 15 GB on the way."""


def listed() -> list[dict[str, Any]]:
    """Images and the layers of the cache."""
    return list(json.loads(out("buildah", "--storage-driver", "overlay", "images", "--all", "--json") or "null") or [])


def image_size(name: str) -> str:
    """Compressed bytes as a node pulls them, in JSON; `name` as it was given to `image`."""
    repository, tag = name.removeprefix(f"{REGISTRY}/").rsplit(":", 1)
    request = urllib.request.Request(
        f"http://{REGISTRY}/v2/{repository}/manifests/{tag}", headers={"Accept": MANIFESTS}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            layers = [layer["size"] for layer in json.load(answer)["layers"]]
    except urllib.error.HTTPError as error:
        raise SystemExit(
            f"{name}: not in the registry {REGISTRY} ({error}); push it with `cluster.py image`"
        ) from error
    return json.dumps({"image": name, "megabytes": round(sum(layers) / 1e6, 1), "layers": layers})


def buildah(*args: object, **options: object) -> None:
    sh("buildah", "--storage-driver", "overlay", *args, **options)


def base(kind: str) -> str:
    """A Debian image with the packages of `BASES[kind]`, made on first use."""
    name = f"localhost/local/{kind}:{DEBIAN}"
    known = ["buildah", "--storage-driver", "overlay", "inspect", "--type", "image", name]
    if subprocess.run(known, capture_output=True).returncode == 0:
        return name
    root, archive = HOME / f"base-{kind}", HOME / f"base-{kind}.tar"
    shutil.rmtree(root, ignore_errors=True)
    sh(
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(BASES[kind])}",
        DEBIAN,
        root,
        stdout=subprocess.DEVNULL,
    )
    for cache in (
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "var/log",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ):
        for entry in (root / cache).iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    sh("tar", "-C", root, "-cf", archive, ".")
    container = out("buildah", "--storage-driver", "overlay", "from", "scratch").strip()
    buildah("add", container, archive, "/", stdout=subprocess.DEVNULL)
    buildah("commit", "--rm", container, name, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    archive.unlink()
    return name


def load(archive: Path) -> None:
    ctr("images", "import", archive)


def scratch_image(name: str, program: Path, path: str) -> Path:
    """A docker archive whose only layer holds `program` at `path`, run as nobody: no registry, no Dockerfile."""
    layer = tar({path: program.read_bytes(), "/etc/passwd": b"nonroot:x:65532:65532::/:/none\n"})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": [path], "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    members = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    archive = STATE / (name.replace("/", "_").replace(":", "_") + ".tar")
    archive.write_bytes(tar(members))
    return archive


def tar(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size, info.mode = len(content), 0o755
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()
