"""Every command and every manifest of README, docs and examples is run, or checked against what it names.

Commands for a cluster are only checked here; `tests/e2e/test_pages.py` types them in. A command of a program that
nobody checks fails.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases.pages import PAGES, TOP, blocks
from cases.program import luthier
from e2e import test_metrics
from e2e.figures import documented

from luthier_api import crd
from luthier_api.base import ApiModel
from luthier_api.kinds import KINDS, FineTuneJob, JobKind
from luthier_api.methods import METHODS
from luthier_api.tasks import GENERATION_TASKS, TRAINING_TASKS
from luthier_api.validation import check_job
from luthier_operator.objects import objects

MANIFESTS = sorted((TOP / "examples").rglob("*.yaml"))
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
KNOWN_LANGUAGES = {"bash", "yaml", "text", "mermaid"}


BLOCKS = list(blocks())
COMMANDS = sorted({(b.page.name, line) for b in BLOCKS for line in b.commands()})


def test_every_block_says_what_it_is() -> None:
    assert {b.language for b in BLOCKS} <= KNOWN_LANGUAGES


# Commands


def run(words: list[str]) -> None:
    done = subprocess.run(
        words, cwd=TOP, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def check_luthier(words: list[str]) -> None:
    """Run it. A `run` becomes `plan --quick`, which checks manifests and options; the running itself is `make
    demo`'s. A `bench` checks its manifest and the values of its options, and then shows its help.
    """
    if words[1] == "run":
        words = ["luthier", "plan", "--quick", *words[2:]]
    if words[1] == "bench":
        words = [*words, "--help"]
    done = luthier(*words[1:], cwd=TOP)
    assert done.returncode == 0, done.stderr


def check_python(words: list[str]) -> None:
    path = TOP / words[1]
    assert path.is_file()
    if path.name == "render.py":
        assert "--check" in words or words[2:] == []


def check_pytest(words: list[str]) -> None:
    assert words[1:3] == ["-m", "pytest"]
    assert (TOP / words[3]).is_file()


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^(\w+):.*##", (TOP / "Makefile").read_text(), re.MULTILINE))
    assert set(words[1:]) <= targets


def check_pip(words: list[str]) -> None:
    """pip itself reads the requirement; what it depends on is not resolved again."""
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(wanted.split(",")) <= extras.keys()
    run([sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-build-isolation", "--quiet"])


def check_uv(words: list[str]) -> None:
    """Run it into another file, without the network: what this machine's cache lacks cannot be resolved (1); a wrong
    option is another error (2).
    """
    assert words[1:3] == ["pip", "compile"]
    assert (TOP / words[-1]).is_file()
    pinned = words.index("--output-file") + 1
    assert (TOP / words[pinned]).is_file()
    if importable("uv"):
        with tempfile.TemporaryDirectory() as folder:
            typed = [*words[1:pinned], f"{folder}/pinned.txt", *words[pinned + 1 :], "--offline", "--quiet"]
            done = subprocess.run(
                [sys.executable, "-m", "uv", *typed], cwd=TOP, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0 or (done.returncode == 1 and "network was disabled" in done.stderr), done.stderr


def check_docker(words: list[str]) -> None:
    text = (TOP / "Dockerfile").read_text()
    for i, word in enumerate(words):
        if word == "--target":
            assert re.search(rf"AS {words[i + 1]}$", text, re.MULTILINE)
        if word == "--build-arg":
            assert re.search(rf"^ARG {words[i + 1].split('=')[0]}\b", text, re.MULTILINE)


def check_helm(words: list[str]) -> None:
    values = yaml.safe_load((TOP / "charts/luthier/values.yaml").read_text())
    for i, word in enumerate(words):
        if word == "--set":
            node: Any = values
            for part in words[i + 1].split("=")[0].split("."):
                assert part in node
                node = node[part]
        if word.startswith("charts/"):
            assert (TOP / word / "Chart.yaml").exists()


def check_kubectl(words: list[str]) -> None:
    for i, word in enumerate(words):
        if word == "-f" and not words[i + 1].startswith("https://"):
            assert (TOP / words[i + 1]).exists()
        if word == "crd":
            assert set(words[i + 1 :]) == {f"{info.plural}.luthier.dev" for info in KINDS.values()}
        if "jobset/releases" in word:
            from luthier_operator.phases.accept import INSTALL_JOBSET

            assert " ".join(words) == INSTALL_JOBSET


def check_kind(words: list[str]) -> None:
    """What tests/cluster/kind.py does."""
    assert words[1:3] in (["create", "cluster"], ["load", "docker-image"])


def importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "luthier": check_luthier,
    "python": check_python,
    ".venv/bin/python": check_pytest,
    "make": check_make,
    "pip": check_pip,
    "uv": check_uv,
    "docker": check_docker,
    "helm": check_helm,
    "kubectl": check_kubectl,
    "kind": check_kind,
}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c[:60]}" for p, c in COMMANDS])
def test_command(page: str, command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words)


# Manifests


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Ours, and pieces of the chart's values; `tests/cluster/test_samples.py` has those of other kinds."""
    for block in BLOCKS:
        for document in block.documents():
            if "kind" not in document or document["kind"] in set(JobKind):
                yield str(block), document
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield str(path.relative_to(TOP)), document


DOCUMENTS = list(documents())


@pytest.mark.parametrize(("where", "document"), DOCUMENTS, ids=[w for w, _ in DOCUMENTS])
def test_yaml(where: str, document: dict[str, Any]) -> None:
    """A manifest is one that the API accepts and the operator can draw; anything else is a piece of the chart's
    values.
    """
    if "kind" not in document:
        values = yaml.safe_load((TOP / "charts/luthier/values.yaml").read_text())
        assert_known(document, values, where)
        return
    job = check_job(document)
    drawn = objects(job)
    assert [o["kind"] for o in drawn][:1] == ["ConfigMap"]
    assert ("JobSet" in {o["kind"] for o in drawn}) == isinstance(job, FineTuneJob)


@pytest.mark.parametrize(("where", "document"), DOCUMENTS, ids=[w for w, _ in DOCUMENTS])
def test_manifest_fits_the_schema_strictly(where: str, document: dict[str, Any]) -> None:
    """As strict validation of the API server does: no field that the CRD does not know."""
    if "kind" not in document:
        pytest.skip("values of the chart")
    kind = JobKind(document["kind"])
    schema = crd.crd(kind, KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    def walk(node: Any, at: dict[str, Any], path: str) -> None:
        if isinstance(node, dict) and "properties" in at:
            assert node.keys() <= at["properties"].keys(), path
            assert set(at.get("required", [])) <= node.keys(), path
            for key, below in node.items():
                walk(below, at["properties"][key], f"{path}.{key}")
        elif isinstance(node, list):
            for below in node:
                walk(below, at["items"], path)
        elif "enum" in at:
            assert node in at["enum"], path

    walk(document["spec"], schema, "spec")


def assert_known(given: Any, known: Any, path: str) -> None:
    if isinstance(given, dict) and isinstance(known, dict) and known:  # an empty one may hold any name
        for key, value in given.items():
            assert key in known, f"{path}: {key}"
            assert_known(value, known[key], f"{path}: {key}")


def test_every_kind_task_and_method_has_an_example() -> None:
    jobs = [check_job(d) for _, d in DOCUMENTS if "kind" in d]
    tuned, made = [j for j in jobs if isinstance(j, FineTuneJob)], [j for j in jobs if not isinstance(j, FineTuneJob)]
    assert {j.spec.task for j in tuned} == set(TRAINING_TASKS)
    assert {j.spec.method.type for j in tuned} == set(METHODS)
    assert {j.spec.task for j in made} == set(GENERATION_TASKS)


def test_every_example_is_named_in_its_list() -> None:
    listed = (TOP / "examples/README.md").read_text()
    for path in (TOP / "examples").glob("*.yaml"):
        assert f"]({path.name})" in listed
        assert path.read_text().startswith("# "), f"{path.name} does not say what it shows"


# Tables, links


def test_tables_are_those_of_the_code() -> None:
    """`python docs/render.py` draws them."""
    assert runpy.run_path(str(TOP / "docs/render.py"))["main"](check=True) == 0


def test_fields_that_the_pages_name_exist() -> None:
    """Words like `spec.model.config` or `hub.tokenSecretRef` in the prose."""
    names = {f.alias or n for m in crd.all_models(ApiModel) for n, f in m.model_fields.items()} | {
        "spec",
        "status",
        "metadata",
    }
    values = (TOP / "charts/luthier/values.yaml").read_text()
    for page in PAGES:
        prose = BLOCKLESS.sub("", page.read_text())
        for word in re.findall(
            r"`((?:spec|model|dataset|method|training|resources|hub|workspace|restarts)\.[\w.]+)`", prose
        ):
            assert set(word.replace("[]", "").split(".")) <= names, f"{page.name}: {word}"
        for word in re.findall(r"`((?:image|trainer|crds|metrics|serviceAccount)\.[\w.]+)`", prose):
            assert word.split(".")[-1] in values, f"{page.name}: {word}"


BLOCKLESS = re.compile(r"```.*?```|<!-- table.*?<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(TOP)) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_licence_is_whole() -> None:
    text = (TOP / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# The walk of one field through the code

STOP = re.compile(r"^\| (\d+) \| `([\w/]+\.py):(\w+)` \|", re.MULTILINE)


def test_the_walk_of_packing_names_what_exists_in_at_most_twelve_stops() -> None:
    stops = STOP.findall((TOP / "docs/architecture.md").read_text())
    assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
    assert 6 <= len(stops) <= 12
    missing = [
        f"{file}:{name}"
        for _, file, name in stops
        if not re.search(rf"^\s*(def|class) {name}\b", (TOP / file).read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_the_tests_on_the_cluster_know_all_metrics_of_the_page() -> None:
    on_pods = (
        test_metrics.TRAINING.keys() | test_metrics.ON_GPUS | test_metrics.GENERATION.keys() | test_metrics.ON_REQUEST
    )
    assert {m.name for m in documented("pod-metrics")} == on_pods
    assert {m.name for m in documented("operator-metrics")} == test_metrics.OPERATOR.keys() | test_metrics.LATER
