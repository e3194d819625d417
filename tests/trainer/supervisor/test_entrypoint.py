"""PID 1 before it starts anything: what it refuses, with which message, and that it imports nothing heavy for it.

Each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases.quick import quick

from luthier_api.termination import TerminationMessage
from luthier_api.terminationlog import LIMIT_BYTES
from luthier_api.variables import Variables

TOKEN = "hf_" + "a1B2" * 9
SPEC = {"task": "causal-lm", "model": {"id": "org/model"}, "dataset": {"id": "org/rows"}}
HEAVY = {"torch", "transformers", "datasets", "numpy", "httpx"}


def entry(folder: Path, arguments: list[str], **environment: str) -> tuple[int, set[str], str]:
    """The image's own entry point: its exit code, the modules that it has imported, and what else it has said."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "luthier_trainer", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, imported, "\n".join(line for line in lines if not line.startswith("import time:"))


def last_word() -> bytes:
    return Path(os.environ[Variables.TERMINATION_LOG]).read_bytes()


def config(folder: Path, **changes: Any) -> str:
    return json.dumps({"kind": "FineTuneJob", "name": "job", "workspace": str(folder / "job"), "spec": SPEC} | changes)


UNKNOWN = {f"field{i}": i for i in range(1000)}


@dataclass(frozen=True)
class RefusedCase:
    name: str
    verb: str
    given: dict[str, Any] | str | bytes
    code: int
    reason: str
    message: str


REFUSED = [
    RefusedCase(
        name="no JSON",
        verb="prepare",
        given="{\n 1",
        code=64,
        reason="InvalidSpec",
        message="run config: invalid JSON: key must be a string at line 2 column 2",
    ),
    RefusedCase(
        name="no text",
        verb="prepare",
        given=b"\xff",
        code=64,
        reason="InvalidSpec",
        message="run config: invalid JSON: expected value at line 1 column 1",
    ),
    RefusedCase(
        name="deeper than anybody reads",
        verb="prepare",
        given="[" * 9999 + "]" * 9999,
        code=64,
        reason="InvalidSpec",
        message="run config: invalid JSON: recursion limit exceeded at line 1 column 202",
    ),
    RefusedCase(
        name="a number without an end",
        verb="prepare",
        given='{"kind": %s}' % ("9" * 5000),
        code=64,
        reason="InvalidSpec",
        message="run config: invalid JSON: number out of range at line 1 column 4311",
    ),
    RefusedCase(
        name="a list",
        verb="prepare",
        given="[]",
        code=64,
        reason="InvalidSpec",
        message="run config: input should be an object (it is [])",
    ),
    RefusedCase(
        name="an unknown field",
        verb="prepare",
        given={"spec": SPEC | {"model": {"pat": "x"}}},
        code=64,
        reason="InvalidSpec",
        message="spec.model.pat: unknown field. Did you mean 'path'?",
    ),
    RefusedCase(
        name="a wrong value",
        verb="train",
        given={"spec": SPEC | {"training": {"epochs": 0}}},
        code=64,
        reason="InvalidSpec",
        message="spec.training.epochs: input should be greater than 0 (it is 0)",
    ),
    RefusedCase(
        name="two mistakes",
        verb="publish",
        given={"spec": SPEC | {"task": "a", "hub": 1}},
        code=64,
        reason="InvalidSpec",
        message="spec.task: input should be 'causal-lm'|; spec.hub: input should be an object (it is 1)",
    ),
    RefusedCase(
        name="a kind that does not fit",
        verb="generate",
        given={},
        code=64,
        reason="InvalidSpec",
        message="kind: generate needs a GenerateJob, but run.json describes a FineTuneJob",
    ),
    RefusedCase(
        name="a token in a wrong place",
        verb="prepare",
        given={"spec": SPEC | {"strategy": TOKEN}},
        code=64,
        reason="InvalidSpec",
        message="|(it is 'hf_…')",
    ),
    RefusedCase(
        name="more than the kubelet keeps",
        verb="prepare",
        given=UNKNOWN,
        code=64,
        reason="InvalidSpec",
        message="field0: unknown field; ",
    ),
    RefusedCase(
        name="a workspace that cannot be",
        verb="prepare",
        given={"workspace": "FOLDER/file/job"},
        code=78,
        reason="Misconfigured",
        message=(
            "spec.workspace: cannot write to FOLDER/file/job: Not a directory. FOLDER/file belongs to USER, mode 0640;"
            " this process is USER (groups "
        ),
    ),
    RefusedCase(
        name="a workspace of the system",
        verb="prepare",
        given={"workspace": "/proc/luthier/job"},
        code=78,
        reason="Misconfigured",
        message=(
            "spec.workspace: cannot write to /proc/luthier/job: |. On a cluster: give the root of the claim to that"
            " group (chgrp GROUP, chmod g+rwx); or, if the claim holds nothing else, set spec.workspace.ownership:"
            " Change, and Kubernetes gives all files on it to the group, where its storage honours fsGroup"
        ),
    ),
]


@pytest.mark.parametrize(
    "case",
    quick(
        REFUSED,
        "no JSON",
        "an unknown field",
        "a token in a wrong place",
        "more than the kubelet keeps",
        "a workspace of the system",
    ),
)
def test_a_mistake_ends_before_torch_is_imported(case: RefusedCase, tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o640)
    text = (
        case.given
        if isinstance(case.given, str | bytes)
        else config(tmp_path, **case.given).replace("FOLDER", str(tmp_path))
    )
    (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    ended, imported, said = entry(tmp_path, [case.verb, "--run", "run.json"])
    assert ended == case.code, said
    assert imported & HEAVY == set()
    assert "luthier_trainer.supervisor.run_config" in imported

    raw = last_word()
    word = TerminationMessage.read(raw.decode())
    assert word is not None
    assert len(raw) <= LIMIT_BYTES
    assert word.encode() == raw, "as the types write it"
    assert (word.phase, word.code, word.reason) == (
        "run" if case.verb in ("train", "generate") else case.verb,
        case.code,
        case.reason,
    )
    begins, _, ends = (
        case.message.replace("FOLDER", str(tmp_path))
        .replace("USER", f"{os.getuid()}:{os.getgid()}")
        .replace("GROUP", str(os.getgid()))
        .partition("|")
    )
    assert word.message.startswith(begins)
    assert word.message.endswith(ends)
    assert word.seconds is not None
    assert 0 <= word.seconds < 30
    assert said.splitlines()[-1].startswith(
        f"supervisor: {word.phase} ended with {case.code} {case.reason}: {word.message}"
    )
    assert TOKEN not in said + raw.decode()


PLACES = ["LUTHIER_RUN_DIR", "TMPDIR", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"]


@pytest.mark.parametrize("variable", PLACES)
def test_a_folder_that_cannot_be_written_ends_before_torch_is_imported(variable: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run.json").write_text(config(tmp_path))
    ended, imported, _ = entry(
        tmp_path, ["prepare", "--run", "run.json"], **{variable: str(tmp_path / "file" / "below")}
    )
    word = TerminationMessage.read(last_word().decode())
    assert word is not None
    assert (ended, word.code) == (78, 78)
    assert word.message.startswith(
        f"{variable}: cannot write to {tmp_path}/file/below: Not a directory. {tmp_path}/file belongs to "
    )
    assert imported & HEAVY == set()


@dataclass(frozen=True)
class CommandCase:
    arguments: list[str]
    variables: dict[str, str]
    message: str


COMMANDS = [
    CommandCase(
        arguments=["teach"],
        variables={},
        message="invalid choice: 'teach'",
    ),
    CommandCase(
        arguments=["train"],
        variables={"LUTHIER_RUN": ""},
        message="--run is missing, and LUTHIER_RUN is not set",
    ),
    CommandCase(
        arguments=["train"],
        variables={"LUTHIER_RUN": "none"},
        message=(
            "supervisor: run ended with 78 Misconfigured: LUTHIER_RUN: cannot read the run config none: No such file"
        ),
    ),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.message[:60])
def test_a_wrong_command(case: CommandCase, tmp_path: Path) -> None:
    ended, imported, said = entry(tmp_path, case.arguments, **case.variables)
    assert ended in (64, 78)
    assert case.message in said
    assert imported & HEAVY == set()


def test_a_stop_at_the_very_beginning_is_not_lost(tmp_path: Path) -> None:
    """The kernel would not deliver a SIGTERM to a process 1 that has no handler yet."""
    early = """
import os, runpy, signal, sys
class Kubelet:
    def find_spec(self, name, path=None, target=None):
        if name == "luthier_trainer.supervisor.entrypoint":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Kubelet())
runpy.run_module("luthier_trainer", run_name="__main__", alter_sys=True)
"""
    (tmp_path / "run.json").write_text(config(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", early, "prepare", "--run", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        timeout=90,
    )
    word = TerminationMessage.read(last_word().decode())
    assert word is not None
    assert done.returncode == 75, done.stderr
    assert word.message == "stopped; the next start continues from here"


def test_an_environment_without_the_types_ends_with_a_message_too(tmp_path: Path) -> None:
    """As in an image in which somebody has installed another pydantic."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('cannot import name ConfigDict')")
    (tmp_path / "run.json").write_text(config(tmp_path))
    ended, _, said = entry(tmp_path, ["prepare", "--run", "run.json"], PYTHONPATH=str(tmp_path))
    word = TerminationMessage.read(last_word().decode())
    assert word is not None
    assert (ended, word.code, word.reason) == (70, 70, "TrainingError"), said
    assert word.message == "ImportError: cannot import name ConfigDict"
