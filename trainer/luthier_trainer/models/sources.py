"""Locates a model or an adapter, and provides its folder.

A source is on the Hub (at a commit), at a path, or the result of another FineTuneJob. `locate` checks that the source
exists without downloading it, `fetch` downloads it. Code from a repository is never run, and pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import Adapter
from luthier_api.grpo import RewardModel
from luthier_api.run import FineTuneRun, GenerateRun, Origin, PreparedRecord
from luthier_api.spec import ModelSource
from luthier_api.status import ResolvedSource
from luthier_api.tasks import TASKS
from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.models import adapter_file, weight_files
from luthier_trainer.models.hub import hub_api, patiently
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import manifest, provenance
from luthier_trainer.workspace.model_files import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    PIPELINE_CONFIG,
    TEXT_SUFFIXES,
    WEIGHTS_INDEX,
)
from luthier_trainer.workspace.provenance import folder_digest
from luthier_trainer.workspace.system_folders import refuse_system_file

VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(-\d+-of-\d+)?\.safetensors$")  # whole or sharded
HALF_INDEX = ".safetensors.index.fp16.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
MODEL_WEIGHTS = re.compile(r"model(\.fp16)?(-\d+-of-\d+)?\.safetensors")
OWN_WEIGHTS: Mapping[str, Any] = {"adapter_kwargs": {"subfolder": "no-adapter"}}
"""An argument of `from_pretrained` that makes it load only the model's own weights. transformers 5.23 finds an adapter
beside a model and adds it by itself; with this argument it looks for one in a folder that does not exist.
"""
LEFT_OUT = (
    "{field}: {what} has an adapter (adapter_config.json) beside the weights of a model. Only the model's own weights"
    " are used. transformers would add the adapter by itself: remove its files, or name them under spec.adapters of a"
    " GenerateJob if the weights lack it"
)


@dataclass(frozen=True)
class Located:
    """A source that exists: either in `folder`, or as `files` of a repository at a commit."""

    resolved: ResolvedSource
    field: str
    folder: Path | None = None
    files: tuple[str, ...] = ()
    file: str | None = None
    """The one file of an adapter for images, in `folder` or among `files`. Other files there are not read."""

    @property
    def origins(self) -> list[Origin]:
        """Return the origins by which a later pod checks that the folder is unchanged.

        For a source on the Hub there are none, because its commit identifies it.
        """
        if self.folder and self.file:
            return [provenance.of_data(self.folder / self.file, self.field)]
        return (
            [Origin(field=self.field, path=str(self.folder), digest=self.resolved.revision or "")]
            if self.folder
            else []
        )

    def fetch(self, into: Path) -> Path:
        """Return the folder that holds the source; a source on the Hub is downloaded to `into`.

        Raises Failure if files are damaged or absent.
        """
        folder = self._download(into) if self.folder is None else self.folder
        if self.file:
            weight_files.check_file(folder / self.file, self.field)
        else:
            weight_files.check(folder, self.field)
        return folder

    def fetch_texts(self, into: Path) -> Path:
        """Return the folder with configuration and tokenizer. Of a model on the Hub, only these come to `into`."""
        if self.folder is not None:
            return self.folder
        return replace(self, files=tuple(name for name in self.files if name.endswith(TEXT_SUFFIXES)))._download(into)

    def _download(self, into: Path) -> Path:
        """Download `files` from the Hub to `into`. Files of the variant fp16 get the plain names."""
        api = hub_api()
        patiently(
            lambda: api.snapshot_download(
                self.resolved.source,
                revision=self.resolved.revision,
                local_dir=into,
                allow_patterns=[_literal(f) for f in self.files],
            ),
            self.field,
            f"model {self.resolved.source}",
        )
        for variant in into.rglob("*.fp16.safetensors") if self.file is None else ():
            # `from_pretrained` looks for the plain name.
            variant.rename(variant.with_name(variant.name.replace(".fp16.", ".")))
        return into


def locate(source: ModelSource | Adapter | RewardModel, run: FineTuneRun | GenerateRun, field: str) -> Located:
    """Find what `source` names. Raises Failure if it does not exist, is not accessible, or cannot be loaded."""
    if isinstance(source, Adapter) and isinstance(run, GenerateRun) and TASKS[run.spec.task].library == "diffusers":
        return _image_adapter(source, run, field)
    if source.id:
        return _on_hub(source.id, source.revision, field, adapter=isinstance(source, Adapter))
    if source.path:
        place, name, folder = f"{field}.path", source.path, check_folder(Path(source.path), f"{field}.path")
    else:
        place, name, folder = (
            f"{field}.job",
            f"FineTuneJob {source.job}",
            result_of(str(source.job), run, f"{field}.job"),
        )
    if (folder / adapter_file.LORA_WEIGHTS).is_file():
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{place}: {name} is an adapter for Stable Diffusion, which belongs under spec.adapters of a GenerateJob"
            " with task: text-to-image. Name another source",
        )
    return Located(ResolvedSource(source=name, revision=folder_digest(folder)), place, folder)


def _image_adapter(adapter: Adapter, run: GenerateRun, field: str) -> Located:
    """Locate the one file of an adapter for images. Its repository or folder needs no configuration.

    Raises Failure if it does not exist.
    """
    if adapter.id:
        api, what, place = hub_api(), f"model {adapter.id}", f"{field}.id"
        info = patiently(lambda: api.model_info(str(adapter.id), revision=adapter.revision), place, what)
        names = [s.rfilename for s in info.siblings or []]
        chosen = adapter_file.choose(names, adapter.file, field, what)
        config = str(PurePosixPath(chosen).parent / ADAPTER_CONFIG)
        return Located(
            ResolvedSource(source=adapter.id, revision=info.sha),
            place,
            files=(chosen, *(n for n in names if n == config)),
            file=chosen,
        )
    if adapter.job:
        place, source = f"{field}.job", f"FineTuneJob {adapter.job}"
        return _adapter_file(result_of(adapter.job, run, place), None, field, place, source)
    folder, place = Path(str(adapter.path)).absolute(), f"{field}.path"
    if folder.is_file():
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{place}: {folder} is a file; set path to {folder.parent} and {field}.file to {folder.name}",
        )
    if not folder.is_dir():
        raise Failure(
            ExitCode.NOT_FOUND, f"{place}: there is no folder {folder}. Is its volume listed under spec.volumes?"
        )
    refuse_system_file(folder, place)
    return _adapter_file(folder, adapter.file, field, place, str(adapter.path))


def _adapter_file(folder: Path, asked: str | None, field: str, place: str, source: str) -> Located:
    """Locate the one file of `folder` that is an adapter for images; `asked` is the file that the user chose, if any.

    Raises Failure if there is no such file, or more than one.
    """
    inside = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    names = [p.as_posix() for p in inside if not any(part.startswith(".") for part in p.parts)]
    chosen = adapter_file.choose(names, asked, field, str(folder))
    return Located(ResolvedSource(source=source, revision=manifest.sha256(folder / chosen)), place, folder, file=chosen)


def _on_hub(name: str, revision: str | None, field: str, adapter: bool) -> Located:
    """Locate a model or an adapter on the Hub. Raises Failure if it does not exist or cannot be loaded."""
    api, what, place = hub_api(), f"model {name}", f"{field}.id"
    info = patiently(lambda: api.model_info(name, revision=revision), place, what)
    names = [s.rfilename for s in info.siblings or []]
    components: list[str] = []
    if PIPELINE_CONFIG in names:
        path = patiently(lambda: api.hf_hub_download(name, PIPELINE_CONFIG, revision=info.sha), place, what)
        components = [k for k, v in json.loads(Path(path).read_text()).items() if isinstance(v, list) and v and v[0]]
    return Located(
        ResolvedSource(source=name, revision=info.sha),
        place,
        files=tuple(files_to_load(names, components, place, what, adapter)),
    )


def files_to_load(names: list[str], components: list[str], field: str, what: str, adapter: bool = False) -> list[str]:
    """Return the files of a repository that are loaded.

    These are the configuration, the tokenizer, and one set of safetensors in each folder. `components` are the folders
    of a diffusers pipeline. If a repository holds a model and an adapter, `adapter` tells which of them is loaded.
    Raises Failure if weights are missing or exist only as pickles.
    """
    if adapter and ADAPTER_CONFIG in names:
        names = [n for n in names if not MODEL_WEIGHTS.fullmatch(n)]
    elif ADAPTER_CONFIG in names and holds_model(names):
        names = [n for n in names if n != ADAPTER_CONFIG]
        notice(LEFT_OUT.format(field=field, what=what))
    folders = components or [""]
    chosen = [PIPELINE_CONFIG] if components else []
    weights: list[str] = []
    for folder in folders:
        inside = [n for n in names if n.rpartition("/")[0] == folder]
        chosen += [
            n for n in inside if n.endswith(TEXT_SUFFIXES) and ".safetensors.index." not in n and n not in chosen
        ]
        weights += (found := _weights(inside))
        chosen += found
        pickles = [n for n in inside if n.endswith(PICKLES)]
        if pickles and not found:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {what} has its weights only as {pickles[0]}. Files that can run code are not opened;"
                " convert them to safetensors, or choose a revision that has them",
            )
    if not weights:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {what} has no weights (*.safetensors)")
    if not components and not {MODEL_CONFIG, ADAPTER_CONFIG} & set(names):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {what} has neither {MODEL_CONFIG} nor {ADAPTER_CONFIG}; it is no model of transformers",
        )
    return chosen


def _weights(names: list[str]) -> list[str]:
    """Return one set of weights among the files of a folder, with its index.

    The plain set is preferred to fp16, and the file names of a model to any others.
    """
    every = [n for n in names if n.endswith(".safetensors")]
    plain = [n for n in every if not VARIANT.search(n)]
    half = [n for n in every if (found := VARIANT.search(n)) and found[1] == "fp16"]
    kept, ending = (plain, WEIGHTS_INDEX) if plain else (half, HALF_INDEX)
    index = [n for n in names if n.endswith(ending)]
    for stem in ("model", "diffusion_pytorch_model", "adapter_model"):
        of_stem = [n for n in kept if n.rpartition("/")[2].startswith((f"{stem}.", f"{stem}-"))]
        if of_stem:
            sharded = [n for n in of_stem if "-of-" in n]
            single = [n for n in of_stem if n not in sharded]
            own = [n for n in index if n.rpartition("/")[2].startswith(f"{stem}.")]
            return single or [*sharded, *own]
    return [*kept, *index]


def check_folder(folder: Path, field: str) -> Path:
    """Return a folder in the pod that holds a model, a pipeline or an adapter, as an absolute path.

    The path is recorded and read by other jobs, so it must not be relative. Raises Failure if the folder does not
    exist, or holds no such source with safetensors.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise Failure(
            ExitCode.NOT_FOUND, f"{field}: there is no folder {folder}. Is its volume listed under spec.volumes?"
        )
    refuse_system_file(folder, field)
    if not any((folder / name).is_file() for name in (MODEL_CONFIG, PIPELINE_CONFIG, ADAPTER_CONFIG)):
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} holds no {MODEL_CONFIG}, {PIPELINE_CONFIG} or {ADAPTER_CONFIG} (it holds: {there})",
        )
    if not any(folder.rglob("*.safetensors")):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} holds no weights (*.safetensors); files that can run code are not opened",
        )
    return folder


def result_of(job: str, run: FineTuneRun | GenerateRun, field: str) -> Path:
    """Return the folder of another job's result, which is verified by its manifest.

    Raises Failure if the result does not exist or is damaged.
    """
    if job not in run.sources:
        raise Failure(ExitCode.NOT_FOUND, f"{field}: the workspace of FineTuneJob {job} is not mounted here")
    result = WorkspaceFolder(Path(run.sources[job])).result
    if not (result / MANIFEST).exists():
        raise Failure(
            ExitCode.NOT_FOUND, f"{field}: FineTuneJob {job} has left no result in {result}. Has it finished?"
        )
    if wrong := manifest.problems(result):
        raise Failure(ExitCode.STORAGE_ERROR, f"{field}: the result of FineTuneJob {job} is damaged: {wrong[0]}")
    return result


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model.

    A folder that holds both is used as a model: its own weights, without the adapter.
    """
    return holds_adapter(folder) and not holds_model(path.name for path in folder.iterdir())


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, possibly beside a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def holds_model(names: Iterable[str]) -> bool:
    """Return whether files with these names are a model.

    An adapter may be saved with the configuration of its model, but not with its weights.
    """
    names = set(names)
    return MODEL_CONFIG in names and any(MODEL_WEIGHTS.fullmatch(name) for name in names)


def record_of(job: str, run: FineTuneRun | GenerateRun, field: str) -> PreparedRecord:
    """Return the record that another job's `prepare` has written. Raises Failure if it cannot be read."""
    path = WorkspaceFolder(Path(run.sources[job])).prepared_record
    try:
        return PreparedRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Failure(ExitCode.NOT_FOUND, f"{field}: FineTuneJob {job} has no readable {path}: {error}") from error


def base_of(job: str, run: FineTuneRun | GenerateRun, field: str) -> Path:
    """Return the folder in this pod of the model that another job's adapter was trained on.

    That job recorded the path in its own pod. A folder in its workspace, or in another workspace that is mounted here,
    is found by the name of the workspace folder. Raises Failure if the model cannot be found, or has changed since the
    adapter was trained on it.
    """
    record = record_of(job, run, field)
    recorded = record.model_path
    path = _reachable(recorded, job, run)
    if path is None:
        raise Failure(
            ExitCode.NOT_FOUND,
            f"{field}: the result of FineTuneJob {job} is an adapter, and its base model {recorded} cannot be reached"
            " from here. List the volume that holds it under spec.volumes with the same mountPath, or let that job"
            " start from a model of the Hub",
        )
    if any(origin.path == recorded and origin.digest != folder_digest(path) for origin in record.origins):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the result of FineTuneJob {job} is an adapter, and its base model, {record.model.source}, has"
            f" changed since it was trained. Run {job} again",
        )
    return path


def _reachable(recorded: str, job: str, run: FineTuneRun | GenerateRun) -> Path | None:
    """Return where the path that job `job` recorded is mounted in this pod, or None if it is not."""
    parts = PurePosixPath(recorded).parts
    for mounted in (run.sources[job], *run.sources.values()):
        name = Path(mounted).name
        if name in parts:
            path = Path(mounted, *parts[len(parts) - parts[::-1].index(name) :])
            if path.is_dir():
                return path
    return Path(recorded) if Path(recorded).is_dir() else None


def _literal(name: str) -> str:
    """Return a glob pattern that matches only this file name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
