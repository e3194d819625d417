"""The shape of the repository.

`operator/__init__.py` must not exist: it would make the folder a package, and from the repository's root (or any path
that holds it first) `import operator` would find ours instead of the standard library's, which `collections`,
`functools` and so everything else import.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier_operator import versions

TOP = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "diffusers", "luthier_trainer")


def python(code: str, *options: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_operator_folder_is_no_package() -> None:
    assert not (TOP / "operator/__init__.py").exists()
    assert (TOP / "operator/luthier_operator/__init__.py").exists()


@pytest.mark.parametrize("path", ["", str(TOP)], ids=["from the root", "with the root on the path"])
def test_the_standard_library_finds_itself(path: str) -> None:
    found = python(
        "import collections, operator; print(operator.itemgetter(0)('a'), operator.__file__)",
        "-S",
        env={"PYTHONPATH": path},
    )
    letter, _, file = found.partition(" ")
    assert letter == "a"
    assert not Path(file).is_relative_to(TOP / "operator")


MODULES = sorted(
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for root in (TOP / "crds", TOP / "operator", TOP / "cli")
    for path in root.rglob("*.py")
    if path.name != "__main__.py"
)


def test_the_control_side_never_imports_torch() -> None:
    """All modules in one process of their own: the tests' own has imported who knows what."""
    code = (
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\nprint([m for m in {HEAVY!r} if"
        " m in sys.modules])"
    )
    assert "luthier_cli.runner" in MODULES
    assert "luthier_api.kinds" in MODULES
    assert python(code) == "[]"


def test_help_imports_little() -> None:
    """The program answers at once: no YAML, no HTTP client, no types of the API, no Kubernetes."""
    late = ("yaml", "httpx", "pydantic", "rich.progress", "kopf", "kubernetes", "cel")
    code = f"import sys, luthier_cli.commands\nprint([m for m in {late!r} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "source", ["crds/luthier_api", "operator/luthier_operator", "cli/luthier_cli", "trainer/luthier_trainer"]
)
def test_every_module_says_why_it_exists(source: str) -> None:
    """In at most eight lines."""
    for path in sorted((TOP / source).rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, path
        assert len(text.splitlines()) <= 8, path


def test_make_tells_of_each_verb() -> None:
    makefile = (TOP / "Makefile").read_text()
    verbs = re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE)
    told = re.findall(r"^([a-z0-9-]+):.* ## \S", makefile, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert verbs == told
    assert len(verbs) <= 12, "few enough to read"
    assert set(phony.split()) == set(verbs)


@dataclass(frozen=True)
class Case:
    name: str
    pattern: str
    defined_in: str
    expect: str


REPEATED = [
    Case(
        name="the release",
        pattern=r"REGISTRY/(?:operator|trainer):([\w.-]+)",
        defined_in="docs/install.md",
        expect=versions.RELEASE,
    ),
    Case(
        name="the chart",
        pattern=r"(?m)^(?:appVersion|version): (\S+)",
        defined_in="charts/luthier/Chart.yaml",
        expect=versions.RELEASE,
    ),
    Case(
        name="the package",
        pattern=r'(?m)^version = "(\S+)"',
        defined_in="pyproject.toml",
        expect=versions.RELEASE,
    ),
    Case(
        name="JobSet",
        pattern=r"jobset/releases/download/([^/]+)/",
        defined_in="docs/install.md",
        expect=versions.JOBSET,
    ),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_a_version_is_the_same_wherever_it_stands(case: Case) -> None:
    pages = [
        TOP / case.defined_in,
        TOP / "README.md",
        TOP / "charts/luthier/templates/NOTES.txt",
        *(TOP / "docs").glob("*.md"),
    ]
    found = {page: re.findall(case.pattern, page.read_text()) for page in pages}
    assert found[TOP / case.defined_in], "the pattern finds what it is about"
    assert {number for numbers in found.values() for number in numbers} == {case.expect}


def test_no_path_of_a_machine_in_the_files() -> None:
    """What one machine calls its folders is nobody else's business."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    words = ("/wo" + "rk/", "/ro" + "ot/")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = TOP / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ""} and path.is_file():
            found += [f"{name}: {word}" for word in words if word in path.read_text(errors="ignore")]
    assert found == []


CONTROL_SIDE = ("crds/luthier_api", "operator/luthier_operator", "cli/luthier_cli")


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions and classes inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
            yield from own_nodes(node)


def raises(function: ast.AST) -> bool:
    """Whether its body has a `raise` with an exception; a bare one passes on what another function raises."""
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in own_nodes(function))


TRAINER = (
    "data",
    "distributed",
    "generation",
    "methods",
    "models",
    "prepare",
    "publish",
    "runtime",
    "scoring",
    "supervisor",
    "tasks",
    "training",
    "workspace",
)


@pytest.mark.parametrize("package", [*CONTROL_SIDE, *(f"trainer/luthier_trainer/{folder}" for folder in TRAINER)])
def test_a_function_that_raises_says_so(package: str) -> None:
    silent = []
    for path in sorted((TOP / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not raises(node):
                continue
            # "Raises Failure if ...", or "Raise Failure if ..." where that is all that the function does.
            if "Raise" not in (ast.get_docstring(node) or ""):
                silent.append(f"{path.relative_to(TOP)}:{node.lineno} {node.name}")
    assert silent == []
