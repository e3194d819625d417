"""Where a model or an adapter comes from, as a folder: the Hub (at a commit), a path, or another FineTuneJob's result.

Nothing is downloaded to find out that it is not there: `locate` asks, `fetch` gets. Code from a repository is never
run, pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import Adapter
from luthier_api.run import FineTuneRun, GenerateRun, Origin, PreparedRecord
from luthier_api.spec import ModelSource
from luthier_api.status import ResolvedSource
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

VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(-\d+-of-\d+)?\.safetensors$")  # of weights, whole or in shards
HALF_INDEX = ".safetensors.index.fp16.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
MODEL_WEIGHTS = re.compile(r"model(\.fp16)?(-\d+-of-\d+)?\.safetensors")
OWN_WEIGHTS: Mapping[str, Any] = {"adapter_kwargs": {"subfolder": "no-adapter"}}
"""An argument of `from_pretrained`. transformers 5.23 adds an adapter that lies beside a model to it, by itself; it
does not look for one there.
"""
LEFT_OUT = (
    "{field}: {what} has an adapter (adapter_config.json) beside the weights of a model. Only the model's own weights"
    " are used. transformers would add the adapter by itself: remove its files, or name them under spec.adapters of a"
    " GenerateJob if the weights lack it"
)


@dataclass(frozen=True)
class Located:
    """A source that exists. Either `folder`, or a repository's `files` at a commit."""

    resolved: ResolvedSource
    field: str
    folder: Path | None = None
    files: tuple[str, ...] = ()
    file: str | None = None
    """The one file of an adapter for images, in `folder` or among `files`. What else lies there is not read."""

    @property
    def origins(self) -> list[Origin]:
        """How the folder is known again. Of the Hub, the commit says it."""
        if self.folder and self.file:
            return [provenance.of_data(self.folder / self.file, self.field)]
        return (
            [Origin(field=self.field, path=str(self.folder), digest=self.resolved.revision or "")]
            if self.folder
            else []
        )

    def fetch(self, into: Path) -> Path:
        """The folder that holds it, its files whole; downloads to `into` when it lies on the Hub. Raises Failure for
        damaged files.
        """
        folder = self._download(into) if self.folder is None else self.folder
        if self.file:
            weight_files.check_file(folder / self.file, self.field)
        else:
            weight_files.check(folder, self.field)
        return folder

    def _download(self, into: Path) -> Path:
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
            # `from_pretrained` looks for the plain name
            variant.rename(variant.with_name(variant.name.replace(".fp16.", ".")))
        return into


def locate(source: ModelSource | Adapter, run: FineTuneRun | GenerateRun, field: str) -> Located:
    """Find what `source` names. Raises Failure when it is not there, not allowed, or not loadable."""
    if isinstance(source, Adapter) and isinstance(run, GenerateRun) and run.spec.task == "text-to-image":
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
            f"{place}: {name} is an adapter for Stable Diffusion XL, which belongs under spec.adapters of a GenerateJob"
            " with task: text-to-image. Name another source",
        )
    return Located(ResolvedSource(source=name, revision=folder_digest(folder)), place, folder)


def _image_adapter(adapter: Adapter, run: GenerateRun, field: str) -> Located:
    """The one file of an adapter for images; its repository or folder needs no configuration. Raises Failure if it is
    not there.
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
    return _adapter_file(folder, adapter.file, field, place, str(adapter.path))


def _adapter_file(folder: Path, asked: str | None, field: str, place: str, source: str) -> Located:
    """The one file of `folder` that is an adapter for images; `asked` is the user's choice. Raises Failure."""
    inside = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    names = [p.as_posix() for p in inside if not any(part.startswith(".") for part in p.parts)]
    chosen = adapter_file.choose(names, asked, field, str(folder))
    return Located(ResolvedSource(source=source, revision=manifest.sha256(folder / chosen)), place, folder, file=chosen)


def _on_hub(name: str, revision: str | None, field: str, adapter: bool) -> Located:
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
    """Those files of a repository that are loaded: configuration, tokenizer, and one set of safetensors in each folder.

    `components` are the folders of a diffusers pipeline. Where a model and an adapter lie side by side, `adapter` says
    which of them is meant. Raises Failure when weights are missing or only there as pickles.
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
    """One set of weights among the files of a folder, with its index: the plain one before fp16, a model's before
    others.
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
    """A folder in the pods that holds a model, a pipeline or an adapter, as an absolute path: other jobs read it too.
    Raises Failure if it is missing or holds none.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise Failure(
            ExitCode.NOT_FOUND, f"{field}: there is no folder {folder}. Is its volume listed under spec.volumes?"
        )
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
    """Folder of another job's result, whole by its manifest. Raises Failure if it is not there, or not whole."""
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
    """Whether a folder holds an adapter and no model. One that holds both is a model: its own weights, without the
    adapter.
    """
    return holds_adapter(folder) and not holds_model(path.name for path in folder.iterdir())


def holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def holds_model(names: Iterable[str]) -> bool:
    """Whether files with these names are a model. An adapter may bring its model's configuration, but not its
    weights.
    """
    names = set(names)
    return MODEL_CONFIG in names and any(MODEL_WEIGHTS.fullmatch(name) for name in names)


def record_of(job: str, run: FineTuneRun | GenerateRun, field: str) -> PreparedRecord:
    """What another job's `prepare` left. Raises Failure."""
    path = WorkspaceFolder(Path(run.sources[job])).prepared_record
    try:
        return PreparedRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Failure(ExitCode.NOT_FOUND, f"{field}: FineTuneJob {job} has no readable {path}: {error}") from error


def base_of(job: str, run: FineTuneRun | GenerateRun, field: str) -> Path:
    """The model that another job's adapter belongs to, where it lies in this pod.

    That job recorded the path in its own pod; what lay in its workspace, or in another one that is mounted here, is
    found again by the name of the workspace folder. Raises Failure when it cannot be, or is no longer the model that
    the adapter was trained on.
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
    parts = PurePosixPath(recorded).parts
    for mounted in (run.sources[job], *run.sources.values()):
        name = Path(mounted).name
        if name in parts:
            path = Path(mounted, *parts[len(parts) - parts[::-1].index(name) :])
            if path.is_dir():
                return path
    return Path(recorded) if Path(recorded).is_dir() else None


def _literal(name: str) -> str:
    """A file name as a glob pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
