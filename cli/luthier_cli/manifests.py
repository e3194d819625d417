"""Reads jobs from files. A file may hold several YAML documents. The mistakes in all files are reported together."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml

from luthier_api import API_VERSION, GROUP
from luthier_api.exitcodes import ExitCode
from luthier_api.formats import FORMATS
from luthier_api.kinds import FineTuneJob, GenerateJob
from luthier_api.validation import InvalidJob, check_job
from luthier_operator.workloads import workload
from luthier_operator.workloads.base import Workload

STDIN = "-"
# What is not a text although it has no quotes, as in Kubernetes. PyYAML differs: it reads 1e-4 as a text, 12:30:45 as a
# number and 2026-03-01 as a date.
PLAIN = [
    ("bool", "y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON|n|N|no|No|NO|false|False|FALSE|off|Off|OFF", "yYtToOnNfF"),
    ("int", "[-+]?(0b[01][01_]*|0o?[0-7][0-7_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        "[-+]?([.][0-9][0-9_]*|[0-9][0-9_]*([.][0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?[.](inf|Inf|INF)|[.](nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class StrictLoader(yaml.SafeLoader):
    """YAML as kubectl reads it. A repeated key is an error (PyYAML silently takes the last one), and values without
    quotes have the types of PLAIN.
    """

    bool_values: ClassVar = yaml.SafeLoader.bool_values | {"y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a repeated key."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice; keep one of them", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_finite(self, node: yaml.ScalarNode) -> float:
        """Raises ConstructorError for infinities and NaN."""
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value}: JSON cannot express it; write a number", node.start_mark
            )
        return value


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.endswith((":null", ":merge"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern, first in PLAIN:
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), list(first))
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.construct_finite)


class Refused(Exception):
    """No job was started. `problems` holds one line each: where the problem is, what it is, what to do."""

    def __init__(self, problems: list[str], code: ExitCode = ExitCode.INVALID_SPEC) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.code = problems, code


@dataclass(frozen=True)
class Manifest:
    """One job, and the file that it was read from."""

    job: FineTuneJob | GenerateJob
    file: str

    @property
    def name(self) -> str:
        return self.job.metadata.name

    @property
    def folder(self) -> Path:
        """Relative paths in the manifest are relative to this folder."""
        return Path.cwd() if self.file == STDIN else Path(self.file).resolve().parent

    @cached_property
    def workload(self) -> Workload:
        return workload(self.job)


def read_manifests(files: list[str]) -> list[Manifest]:
    """The jobs of `files`, in their order. `-` is standard input. Objects of other API groups are ignored.

    Raises Refused.
    """
    found: list[Manifest] = []
    problems: list[str] = []
    for file in files:
        documents = _documents(file, problems)
        of_luthier = [document for document in documents if not _foreign(document)]
        if documents and not of_luthier:
            problems.append(f"{file}: holds no FineTuneJob and no GenerateJob")
        for document in of_luthier:
            if not isinstance(document, dict):
                problems.append(
                    f"{file}: not a Kubernetes object: {document!r:.60}; start it with apiVersion: {API_VERSION}"
                )
                continue
            if "apiVersion" not in document:
                problems.append(f"{file}: {_title(document)}: apiVersion: required; write {API_VERSION}")
            try:
                manifest = Manifest(check_job(document), file)
            except InvalidJob as error:
                problems += [f"{file}: {_title(document)}: {problem}" for problem in error.problems]
                continue
            if any(m.name == manifest.name for m in found):
                problems.append(f"{file}: metadata.name: {manifest.name!r} is used twice; each job needs its own name")
            found.append(manifest)
    if problems:
        raise Refused(problems)
    return found


def _documents(file: str, problems: list[str]) -> list[Any]:
    try:
        text = sys.stdin.read() if file == STDIN else Path(file).read_text()
        documents = [d for d in yaml.load_all(text, StrictLoader) if d is not None]
    except OSError as error:
        problems.append(f"{file}: {error.strerror or error}")
        return []
    except (yaml.reader.ReaderError, UnicodeDecodeError):
        problems.append(_is_dataset(file) or f"{file}: not text, and so no manifest; give the file of a job")
        return []
    except yaml.YAMLError as error:
        problems.append(_is_dataset(file) or f"{file}: not YAML: {' '.join(str(error).split())}")
        return []
    if not documents:
        problems.append(f"{file}: is empty")
    has_version = any(isinstance(document, dict) and "apiVersion" in document for document in documents)
    if not has_version and documents and (dataset := _is_dataset(file)):
        problems.append(dataset)
        return []
    return documents


def _is_dataset(file: str) -> str | None:
    """What to do with a file that is no manifest but has the suffix of a dataset; None for other files."""
    suffixes = {suffix for info in FORMATS.values() for suffix in info.suffixes}
    name = Path(file).name.lower()
    for compression in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(compression)
    if Path(name).suffix not in suffixes:
        return None
    return f"{file}: a dataset, not a manifest; name it in spec.dataset.files of a FineTuneJob, and give the job's file"


def _foreign(document: Any) -> bool:
    """Whether it is a Kubernetes object of another API group, such as a volume claim beside the job."""
    if not isinstance(document, dict):
        return False
    version = str(document.get("apiVersion", ""))
    return bool(version) and version.split("/")[0] != GROUP and bool(document.get("kind"))


def _title(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    name = metadata.get("name", "") if isinstance(metadata, dict) else ""
    return f"{document.get('kind', 'object')} {name}".strip()
