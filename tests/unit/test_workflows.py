"""The files for GitHub name what exists: make commands, images, scripts, versions.

actionlint, in the workflow `CI`, checks that GitHub can read the workflows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
GITHUB = TOP / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
MAKEFILE = (TOP / "Makefile").read_text()
MAKE_VERBS = set(re.findall(r"^([a-z0-9]+):.*##", MAKEFILE, re.MULTILINE))
IMAGES = {"operator", "trainer"}


def load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict), path
    return document


@dataclass(frozen=True)
class Step:
    """One step of a workflow, or a job that calls another workflow."""

    workflow: str
    uses: str
    run: str
    settings: dict[str, Any]


def steps() -> list[Step]:
    found = []
    for path in WORKFLOWS:
        for job in load(path)["jobs"].values():
            found += [
                Step(
                    workflow=path.name,
                    uses=step.get("uses", ""),
                    run=step.get("run", ""),
                    settings=step.get("with", {}),
                )
                for step in [job, *job.get("steps", [])]
            ]
    return found


STEPS = steps()


def test_the_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "e2e.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "write" not in job.get("permissions", {}).values() or path.name == "release.yml", name
        assert "timeout-minutes" in job or "uses" in job, f"{name}: GitHub's own limit is six hours"


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_actions_are_pinned_to_a_commit_and_name_its_version(path: Path) -> None:
    """A tag can be moved to other code; a commit cannot. Actions of this repository need neither."""
    used = re.findall(r"uses: (.*)$", path.read_text(), re.MULTILINE)
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+|\./\.github/\S+", action), action


def test_one_action_has_one_version() -> None:
    pinned = {tuple(step.uses.split("@")) for step in STEPS if "@" in step.uses}
    assert len(pinned) == len({name for name, _ in pinned})


def test_workflows_use_make_commands_and_scripts_that_exist() -> None:
    verbs = {verb for step in STEPS for verb in re.findall(r"\bmake ([a-z0-9]+)", step.run)}
    assert {"lint", "test", "cluster", "images", "e2e"} <= verbs
    assert verbs <= MAKE_VERBS

    scripts = {script for step in STEPS for script in re.findall(r"(?<![\w/])\.ci/[\w-]+", step.run)}
    assert scripts == {".ci/release"}
    for script in scripts:
        assert (TOP / script).stat().st_mode & 0o100, f"{script} is not executable"


def test_the_steps_of_the_release_are_verbs_of_its_script() -> None:
    used = {verb for step in STEPS for verb in re.findall(r"\.ci/release (\w+)", step.run)}
    offered = set(re.findall(r"^([a-z]+)\(\) \{$", (TOP / ".ci/release").read_text(), re.MULTILINE)) - {"fail"}
    assert used == offered


def test_python_is_the_oldest_supported_version() -> None:
    versions = {step.settings["python-version"] for step in STEPS if "actions/setup-python@" in step.uses}
    assert {f">={version}" for version in versions} == {PROJECT["requires-python"]}


def test_every_use_of_make_follows_a_set_up_python() -> None:
    for path in WORKFLOWS:
        for name, job in load(path)["jobs"].items():
            commands = [step.get("uses", step.get("run", "")) for step in job.get("steps", [])]
            makes = [i for i, command in enumerate(commands) if command.startswith("make ")]
            pythons = [i for i, command in enumerate(commands) if command.startswith("actions/setup-python@")]
            assert not makes or pythons[0] < makes[0], f"{path.name}: {name}"


# Images


def test_released_images_are_those_of_the_dockerfile_the_chart_and_the_pages() -> None:
    matrix = load(GITHUB / "workflows/release.yml")["jobs"]["images"]["strategy"]["matrix"]["image"]
    targets = re.findall(r"^FROM \$\{BASE\} AS (\S+)$", (TOP / "Dockerfile").read_text(), re.MULTILINE)
    platforms = re.findall(r'^  \[(\w+)\]="([\w/,]+)"$', (TOP / ".ci/release").read_text(), re.MULTILINE)
    pages = re.findall(r"REGISTRY/(\w+):", (TOP / "docs/install.md").read_text())

    assert set(matrix) == IMAGES
    assert set(targets) == IMAGES
    assert dict(platforms) == {"operator": "linux/amd64,linux/arm64", "trainer": "linux/amd64"}
    assert set(pages) == IMAGES

    values = yaml.safe_load((TOP / "charts/luthier/values.yaml").read_text())
    notes = release("notes", "registry.example/luthier", folder=TOP).stdout
    settings = dict(re.findall(r"--set (\S+)=registry\.example/luthier/(\w+)", notes))
    assert settings == {"image.repository": "operator", "trainer.image.repository": "trainer"}
    assert "repository" in values["image"]
    assert "repository" in values["trainer"]["image"]


# The script of the release


def release(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(folder / ".ci/release"), *arguments], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Case:
    name: str
    tag: str
    expect: str
    package: str = "1.2.3"
    chart: str = "1.2.3"
    app: str = "1.2.3"
    heading: str = "## 1.2.3, 2026-12-01"


CASES = [
    Case(
        name="all agree",
        tag="v1.2.3",
        expect="",
    ),
    Case(
        name="another tag",
        tag="v1.2.4",
        expect="tag v1.2.4: pyproject.toml has version 1.2.3",
    ),
    Case(
        name="a tag without v",
        tag="1.2.3",
        expect="tag 1.2.3: pyproject.toml has version 1.2.3",
    ),
    Case(
        name="a chart of another version",
        tag="v1.2.3",
        chart="1.2.2",
        expect="Chart.yaml: version is not 1.2.3",
    ),
    Case(
        name="a chart for another version of the images",
        tag="v1.2.3",
        app="1.2.2",
        expect="Chart.yaml: appVersion is not 1.2.3",
    ),
    Case(
        name="a changelog that calls it unreleased",
        tag="v1.2.3",
        heading="## 1.2.3, unreleased",
        expect='CHANGELOG.md: no heading "## 1.2.3, YYYY-MM-DD"',
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_release_has_one_version(case: Case, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(TOP / ".ci/release", tmp_path / ".ci/release")
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "luthier"\nversion = "{case.package}"\n')
    (tmp_path / "charts/luthier").mkdir(parents=True)
    (tmp_path / "charts/luthier/Chart.yaml").write_text(f"version: {case.chart}\nappVersion: {case.app}\n")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{case.heading}\n\n- one\n\n## 1.2.2, 2026-11-01\n\n- two\n")

    done = release("check", case.tag, folder=tmp_path)
    if not case.expect:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert case.expect in done.stderr


def test_the_notes_are_the_section_of_this_version() -> None:
    notes = release("notes", "registry.example/luthier", folder=TOP).stdout
    changelog = (TOP / "CHANGELOG.md").read_text()
    (section,) = re.findall(rf"^## {PROJECT['version']}, .*?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    assert notes.startswith(section)
    assert f"--version {PROJECT['version']} " in notes


# What people read and fill in


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".github/pull_request_template.md", ".pre-commit-config.yaml"])
def test_make_commands_in_the_text_exist(page: str) -> None:
    named = set(re.findall(r"[`(]make ([a-z0-9]+)[`)]", (TOP / page).read_text()))
    assert named
    assert named <= MAKE_VERBS


def test_contributing_explains_each_make_command() -> None:
    explained = re.findall(r"^\| `make (\w+)` \|", (TOP / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(explained) == MAKE_VERBS - {"help", "setup"}


def test_commit_hooks_are_commands_of_make_lint() -> None:
    lint = MAKEFILE.replace("$(PYTHON)", ".venv/bin/python").replace("$(VENV)", ".venv")
    hooks = [hook for repo in load(TOP / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert hooks
    for hook in hooks:
        assert hook["language"] == "system", "a hook of another language needs more than the package index"
        command = re.sub(r" --(?:fix|force-exclude)", "", hook["entry"])
        assert f"\n\t{command}" in lint, hook["entry"]


FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


@pytest.mark.parametrize("path", FORMS, ids=[path.name for path in FORMS])
def test_an_issue_form_is_one_that_github_shows(path: Path) -> None:
    """GitHub leaves out a form with a mistake, without a message to the reporter."""
    form = load(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    assert {field["type"] for field in form["body"]} <= FIELDS
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert asked
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)
    assert all(field["attributes"]["options"] for field in asked if field["type"] in ("dropdown", "checkboxes"))


def test_dependabot_watches_folders_that_exist() -> None:
    config = load(GITHUB / "dependabot.yml")
    assert config["version"] == 2
    assert {update["package-ecosystem"] for update in config["updates"]} == {"pip", "github-actions"}
    for update in config["updates"]:
        assert (TOP / update["directory"].lstrip("/")).is_dir()
