"""A job on this machine: its folder, its paths, its GPUs, its run config.

Folders replace the volumes and claims of a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier_api.decides import planned_part, result_part
from luthier_api.exitcodes import ExitCode
from luthier_api.kinds import JobKind, source_of
from luthier_api.run import RUNS, FineTuneRun, GenerateRun, read_run
from luthier_api.secrets import VARIABLES, references, variables_of
from luthier_api.status import PHASES, Phase
from luthier_api.validation import InvalidJob, check_job
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder, shard_manifests
from luthier_cli.manifests import Manifest, Refused
from luthier_operator.workloads.base import Workload, plural

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Place:
    """Where `luthier run` works, and which folders replace the volumes of a cluster."""

    root: Path
    mounts: dict[str, Path]
    """Mount path in the pods → folder here."""

    def folder(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True)
class LocalJob:
    """One manifest, mapped to this machine."""

    manifest: Manifest
    place: Place

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def workload(self) -> Workload:
        return self.manifest.workload

    @property
    def kind(self) -> JobKind:
        return self.workload.kind

    @property
    def folder(self) -> WorkspaceFolder:
        return WorkspaceFolder(self.place.folder(self.name))

    @property
    def run_file(self) -> Path:
        return self.folder.root / RUN_FILE

    @staticmethod
    def step(phase: Phase, index: int) -> str:
        """Name of what a pod would do: `prepare`, `run-0`, `run-1`, `publish`."""
        return f"run-{index}" if phase == "run" else phase

    def log(self, step: str) -> Path:
        """Output of a step."""
        return self.folder.root / "logs" / f"{step}.log"

    def end(self, step: str) -> Path:
        """Termination message of a step."""
        return self.folder.root / "ends" / f"{step}.json"

    @property
    def phases(self) -> list[Phase]:
        """The phases of the job, in their order."""
        hub = self.manifest.job.spec.hub
        return ["prepare", "run", "publish"] if hub and hub.repo else ["prepare", "run"]

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The user's spec with every default, and with paths of this machine."""
        spec = self.manifest.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        for field, parent, key in paths_in(spec):
            parent[key] = self.here(field, parent[key])
        return spec

    def here(self, field: str, path: str) -> str:
        """`path` on this machine: below a mount, or relative to the manifest. An address is itself. Raises Refused."""
        if "://" in path:
            return path
        if not Path(path).is_absolute():
            return str(self.manifest.folder / path)
        for mount in sorted(self.place.mounts, key=len, reverse=True):  # a mount inside another one comes first
            if Path(path).is_relative_to(mount):
                return str(self.place.mounts[mount] / Path(path).relative_to(mount))
        for volume in self.manifest.job.spec.volumes:
            mount = volume.mount_path
            if Path(path).is_relative_to(mount) and not Path(mount).exists():
                raise Refused(
                    [
                        f"{self.manifest.file}: {field}: {path} is on a volume of the cluster; name the folder of this"
                        f" machine that replaces it: --mount {mount}=FOLDER"
                    ],
                    ExitCode.NOT_FOUND,
                )
        return path

    def run_config(self, rendezvous_port: int) -> FineTuneRun | GenerateRun:
        """Return the run config of the job on this machine."""
        sources = {name: str(self.place.folder(source_of(name)[1])) for name in self.workload.sources.values()}
        run = {
            "kind": self.kind.value,
            "name": self.name,
            "workspace": str(self.folder.root),
            "sources": sources,
            "spec": self.spec,
            "rendezvousPort": rendezvous_port,
            "metricsPort": 0,
        }
        return RUNS[self.kind].model_validate(run)

    def write_run(self) -> None:
        """Write the run config. Raises Refused if the folder holds work of a different manifest."""
        before = self._run_before()
        port = before.rendezvous_port if before and is_free(before.rendezvous_port) else free_port()
        after = self.run_config(port)
        if before and (changed := difference(result_part(before.spec), result_part(after.spec))):
            if any(made.exists() for made in (self.folder.checkpoints, self.folder.shards, self.folder.result)):
                raise Refused(
                    [
                        f"{self.manifest.file}: {changed}. {self.folder.root} holds a run of the earlier manifest;"
                        " give the job another metadata.name, or start it over with --fresh"
                    ]
                )
            self.end("prepare").unlink(missing_ok=True)  # only `prepare` has run, and it runs again
        if before and planned_part(before.spec) != planned_part(after.spec) and not self.folder.result.exists():
            self.end("prepare").unlink(missing_ok=True)  # it plans again; what it has prepared stays
        if before and before.spec.hub != after.spec.hub:
            self.end("publish").unlink(missing_ok=True)  # the result is published again, to the new place
        self.run_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.run_file.with_suffix(".partial")
        partial.write_text(json.dumps(after.dump(), indent=1))
        partial.replace(self.run_file)

    def _run_before(self) -> FineTuneRun | GenerateRun | None:
        """The run config of an earlier call. Raises Refused when it cannot be read."""
        if not self.run_file.exists():
            return None
        try:
            return read_run(self.run_file.read_bytes())
        except (OSError, ValueError) as error:
            raise Refused(
                [
                    f"{self.run_file}: not a run config of this version ({type(error).__name__}); start the job over"
                    " with --fresh"
                ]
            ) from None

    def environment(self, phase: Phase, index: int = 0) -> dict[str, str]:
        """Environment of one supervisor: credentials only where they are needed, and only the GPUs of its pod."""
        left_out = {"HUGGING_FACE_HUB_TOKEN", Variables.RUN} | VARIABLES - variables_of(phase)
        env = {name: value for name, value in os.environ.items() if name not in left_out}
        # All nodes of the group run here, and `runner` finds the one that failed first.
        env.setdefault("LUTHIER_PEER_LOST_LINGER", "1")
        each = self.workload.gpus_per_pod
        if phase == "run" and each:
            # Only the GPUs that a pod would have: a process that sees more of them splits its batches over all.
            gpus = visible_gpus()
            group = next(group for group in self.workload.groups if index in group)
            first = group.index(index) * each
            if "CUDA_VISIBLE_DEVICES" not in env:
                env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi numbers them so
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + each])
        return env


ROW_FILES = ("image", "initImage", "mask", "audio")  # fields of an inline row that name a file


def paths_in(spec: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, container, key) of every path in a spec."""
    found: list[tuple[str, Any, Any]] = []
    if "path" in spec["model"]:
        found.append(("spec.model.path", spec["model"], "path"))
    for i, adapter in enumerate(spec.get("adapters", [])):
        if "path" in adapter:
            found.append((f"spec.adapters[{i}].path", adapter, "path"))
    for name in ("refiner", "safety"):
        if "path" in spec.get("image", {}).get(name, {}):
            found.append((f"spec.image.{name}.path", spec["image"][name], "path"))
    for i, reward in enumerate(spec.get("grpo", {}).get("rewards", [])):
        if "file" in reward:
            found.append((f"spec.grpo.rewards[{i}].file", reward, "file"))
        if "path" in reward.get("model", {}):
            found.append((f"spec.grpo.rewards[{i}].model.path", reward["model"], "path"))
    for i, row in enumerate(spec.get("inputs", {}).get("rows", [])):
        found += [(f"spec.inputs.rows[{i}].{name}", row, name) for name in ROW_FILES if name in row]
    dataset, at = (
        (spec["dataset"], "spec.dataset")
        if "dataset" in spec
        else (spec["inputs"].get("dataset", {}), "spec.inputs.dataset")
    )
    mixed = dataset.get("mix", {}).get("sources", [])
    for source, where in [(dataset, at), *((part, f"{at}.mix.sources[{n}]") for n, part in enumerate(mixed))]:
        for name in ("files", "evalFiles"):
            files = source.get(name, [])
            found += [(f"{where}.{name}[{i}]", files, i) for i in range(len(files))]
    if "file" in dataset.get("chatTemplate", {}):
        found.append((f"{at}.chatTemplate.file", dataset["chatTemplate"], "file"))
    return found


def difference(before: dict[str, Any], after: dict[str, Any], path: str = "spec") -> str | None:
    """The first field that differs, as a sentence."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if deeper := difference(old, new, f"{path}.{key}"):
                return deeper
        elif old != new:
            return f"{path}.{key} was {old!r} and is {new!r}"
    return None


def on_cpu(manifest: Manifest) -> Manifest:
    """The same job without GPUs. Raises Refused if it requests something that needs a GPU."""
    document = manifest.job.model_dump(mode="json", by_alias=True, exclude_none=True)
    field = manifest.workload.gpus_field.rpartition(".")[2]
    document["spec"]["resources"][field] = 0
    for name in ("gpuClass", "gpuMemory"):
        document["spec"]["resources"].pop(name, None)
    try:
        return Manifest(check_job(document), manifest.file)
    except InvalidJob as error:
        raise Refused([f"{manifest.file}: without GPUs (--cpu): {problem}" for problem in error.problems]) from None


def has_result(folder: WorkspaceFolder, kind: JobKind) -> bool:
    """Whether the folder of a job of this kind holds its whole result."""
    if kind is JobKind.FINE_TUNE:
        return folder.result_manifest.exists()
    return bool(shard_manifests(folder))


def check_place(
    jobs: list[LocalJob],
    environ: dict[str, str],
    gpus: Callable[[], list[str]] | None = None,
    *,
    plan_only: bool = False,
) -> None:
    """Check what can be checked before the first process starts. Planning needs no GPU and publishes nothing.

    Raises Refused.
    """
    problems: list[tuple[ExitCode, str]] = []
    for i, job in enumerate(jobs):
        spec, file = job.manifest.job.spec, job.manifest.file
        for field, (kind, name) in ((f, source_of(source)) for f, source in job.workload.sources.items()):
            earlier = any(j.name == name and j.kind is kind for j in jobs[:i])
            if earlier and not plan_only:
                continue
            if any(j.name == name for j in jobs[i:]):
                problems.append(
                    (
                        ExitCode.INVALID_SPEC,
                        f"{file}: {field}: {name!r} comes later on the command line; name its file first",
                    )
                )
            elif not has_result(WorkspaceFolder(job.place.folder(name)), kind):
                what_now = (
                    "run it first: a job that was only planned has no result"
                    if earlier
                    else "run its manifest first, or name it before this one"
                )
                problems.append(
                    (
                        ExitCode.NOT_FOUND,
                        f"{file}: {field}: no finished {kind} {name!r} in {job.place.root}; {what_now}",
                    )
                )
        if plan_only:
            continue
        if spec.hub and not environ.get(Variables.TOKEN) and not logged_in():
            problems.append(
                (
                    ExitCode.UNAUTHORIZED,
                    (
                        f"{file}: spec.hub.tokenSecretRef: here the token comes from the environment: export"
                        f" {Variables.TOKEN}=..., or log in: hf auth login"
                    ),
                )
            )
        for variable, field in credentials(spec).items():
            if not environ.get(variable):
                problems.append(
                    (
                        ExitCode.UNAUTHORIZED,
                        (
                            f"{file}: {field}: here credentials come from the environment: export {variable}=..., or"
                            f" remove {field.rpartition('.')[2]}"
                        ),
                    )
                )
        field, needed = job.workload.gpus_field, job.workload.gpus_at_once
        here = len((gpus or visible_gpus)()) if needed else 0
        if here < needed:
            problems.append(
                (
                    ExitCode.MISCONFIGURED,
                    (
                        f"{file}: {field}: needs {plural(needed, 'GPU')}, this machine has {here}. Run it on"
                        f" the CPU with --cpu (or {field.rsplit('.', 1)[1]}: 0), or on a cluster: kubectl apply -f"
                        f" {file}"
                    ),
                )
            )
    if missing := [name for name in ("luthier_trainer", "torch", "transformers") if find_spec(name) is None]:
        problems.append(
            (
                ExitCode.MISCONFIGURED,
                f"{', '.join(missing)} not installed: pip install '.[trainer]' in Luthier's sources",
            )
        )
    if problems:
        raise Refused([text for _, text in problems], problems[0][0])


def credentials(spec: object) -> dict[str, str]:
    """Environment variable → field, of the credentials that a job uses. That of the Hub may also be in a file."""
    found = [reference for phase in PHASES for reference in references(spec, phase)]
    return {reference.variable: reference.field for reference in found if reference.variable != Variables.TOKEN}


def logged_in() -> bool:
    """Whether `hf auth login` has left a token here: the trainer's `hub.hub_token` finds it by itself."""
    if find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub.constants import HF_TOKEN_PATH

    try:
        return bool(Path(HF_TOKEN_PATH).read_bytes().strip())
    except OSError:
        return False


def visible_gpus() -> list[str]:
    """Indices or ids of the GPUs that a process would see, from the driver: importing torch would take seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return answer.stdout.split() if answer.returncode == 0 else []


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
