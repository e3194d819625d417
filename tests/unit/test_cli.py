"""The command line beside `run`: help, checks, drawing. `test_cli_run` has the running."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from cases.api import FINE_TUNE, GENERATE, Document, changed
from cases.program import luthier
from rich.table import Table

from luthier_api.crd import render as crds
from luthier_api.processes import descendants
from luthier_api.status import Progress
from luthier_cli.estimates import shown
from luthier_cli.local import difference, paths_in
from luthier_cli.manifests import StrictLoader
from luthier_cli.screen import describe, duration

ON_CPU: Document = {"spec.dataset": {"id": "org/data"}, "spec.resources": {"gpusPerNode": 0}}


def write(folder: Path, *documents: object, name: str = "job.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump_all(documents))
    return name


def test_help_names_every_verb() -> None:
    done = luthier("--help")
    assert done.returncode == 0
    for verb in ("run", "plan", "render", "operator", "crds", "version"):
        assert f"│ {verb} " in done.stdout


def test_version() -> None:
    assert luthier("version").stdout.strip() == luthier("--version").stdout.strip() == version("luthier")


def test_crds_are_those_of_the_types() -> None:
    assert luthier("crds").stdout == "".join(f"---\n{text}" for text in crds().values())


@dataclass(frozen=True)
class SettingCase:
    name: str
    environment: dict[str, str]
    message: str


SETTINGS = [
    SettingCase(
        name="not a number",
        environment={"LUTHIER_WORKERS": "many"},
        message="LUTHIER_WORKERS: Input should be a valid integer",
    ),
    SettingCase(
        name="not a size",
        environment={"LUTHIER_WORKSPACE_SIZE": "big"},
        message="LUTHIER_WORKSPACE_SIZE: must be an amount above zero",
    ),
    SettingCase(
        name="ours",
        environment={"LUTHIER_ENV": '{"HF_TOKEN": "x"}'},
        message="LUTHIER_ENV: HF_TOKEN: set by Luthier itself; remove it",
    ),
    SettingCase(
        name="not JSON",
        environment={"LUTHIER_ENV": "NCCL_DEBUG=WARN"},
        message="LUTHIER_ENV: must be a JSON object",
    ),
    SettingCase(
        name="deep in JSON",
        environment={"LUTHIER_GPU_CLASSES": '{"h100": {"memory": "much"}}'},
        message="LUTHIER_GPU_CLASSES: h100.memory: must be an amount above zero",
    ),
    SettingCase(
        name="no image for the jobs",
        environment={},
        message="LUTHIER_TRAINER_IMAGE: required, the image of every pod of a job",
    ),
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case.name)
def test_a_wrong_setting_ends_the_operator_with_a_line(case: SettingCase) -> None:
    done = luthier("operator", **case.environment)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (78, 1), done.stderr
    assert case.message in done.stderr


USAGE = [("no such verb", ("fly",)), ("no such option", ("run", "--fast", "x.yaml")), ("no file named", ("run",))]


@pytest.mark.parametrize(("name", "words"), USAGE, ids=[u[0] for u in USAGE])
def test_a_command_line_that_cannot_be_read(name: str, words: tuple[str, ...]) -> None:
    assert luthier(*words).returncode == 64


@dataclass(frozen=True)
class RefusedCase:
    name: str
    documents: list[object]
    code: int
    problems: list[str]
    arguments: tuple[str, ...] = ()


REFUSED = [
    RefusedCase(
        name="every problem of every job at once",
        documents=[
            changed(FINE_TUNE, {"metadata.name": "a.b", "spec.hub": {"repo": "o/m"}}),
            changed(GENERATE, {"spec.zebra": 1}),
        ],
        code=64,
        problems=[
            "job.yaml: FineTuneJob a.b: metadata.name: lower-case letters",
            "job.yaml: FineTuneJob a.b: spec.hub.tokenSecretRef: publishing",
            "job.yaml: GenerateJob sound: spec.zebra: unknown field",
        ],
    ),
    RefusedCase(
        name="two jobs of one name",
        documents=[changed(FINE_TUNE, ON_CPU), changed(FINE_TUNE, ON_CPU)],
        code=64,
        problems=["metadata.name: 'sound' is used twice"],
    ),
    RefusedCase(
        name="another kind only",
        documents=[{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}],
        code=64,
        problems=["job.yaml: holds no FineTuneJob and no GenerateJob"],
    ),
    RefusedCase(
        name="no object",
        documents=["hello"],
        code=64,
        problems=["job.yaml: not a Kubernetes object: 'hello'"],
    ),
    RefusedCase(
        name="no version",
        documents=[{"kind": "FineTuneJob", "metadata": {"name": "x"}, "spec": FINE_TUNE["spec"]}],
        code=64,
        problems=["apiVersion: required; write luthier.dev/v1alpha1"],
    ),
    RefusedCase(
        name="nothing",
        documents=[],
        code=64,
        problems=["job.yaml: is empty"],
    ),
    RefusedCase(
        name="a job that comes later",
        documents=[
            changed(FINE_TUNE, ON_CPU | {"spec.model": {"job": "second"}}),
            changed(FINE_TUNE, ON_CPU | {"metadata.name": "second"}),
        ],
        code=64,
        problems=["spec.model.job: 'second' comes later on the command line; name its file first"],
    ),
    RefusedCase(
        name="a job that never ran",
        documents=[changed(GENERATE, {"spec.adapters": [{"job": "other"}], "spec.resources": {"gpus": 0}})],
        code=66,
        problems=["spec.adapters[0].job: no finished FineTuneJob 'other' in"],
    ),
    RefusedCase(
        name="a job without outputs",
        documents=[
            changed(
                GENERATE,
                {"spec.inputs": {"job": "other", "columns": {"prompt": "text"}}, "spec.resources": {"gpus": 0}},
            )
        ],
        code=66,
        problems=["spec.inputs.job: no finished GenerateJob 'other' in"],
    ),
    RefusedCase(
        name="more GPUs than there are",
        documents=[
            changed(FINE_TUNE, {"spec.dataset": {"id": "o/d"}, "spec.resources": {"nodes": 2, "gpusPerNode": 4}})
        ],
        code=78,
        problems=[
            "spec.resources.gpusPerNode: needs 8 GPUs, this machine has 0",
            "--cpu",
            "gpusPerNode: 0",
            "kubectl apply -f job.yaml",
        ],
    ),
    RefusedCase(
        name="a GPU for a shard",
        documents=[GENERATE],
        code=78,
        problems=["spec.resources.gpus: needs 1 GPU, this machine has 0"],
    ),
    RefusedCase(
        name="a mount that is none",
        documents=[changed(FINE_TUNE, ON_CPU)],
        arguments=("--mount", "data"),
        code=64,
        problems=["--mount data: write it as /path/in/the/pods=folder/here"],
    ),
    RefusedCase(
        name="a GPU's precision without a GPU",
        documents=[changed(GENERATE, {"spec.precision": "fp16"})],
        arguments=("--cpu",),
        code=64,
        problems=["job.yaml: without GPUs (--cpu): spec.precision: fp16 needs a GPU"],
    ),
    RefusedCase(
        name="a token that is not there",
        documents=[changed(FINE_TUNE, ON_CPU | {"spec.hub": {"tokenSecretRef": {"name": "hf"}}})],
        code=77,
        problems=["export HF_TOKEN=..., or log in: hf auth login"],
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_before_anything_starts(tmp_path: Path, case: RefusedCase) -> None:
    done = luthier(
        "run", write(tmp_path, *case.documents), *case.arguments, "-o", "json", cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == case.code, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["code"], answer["jobs"]) == (case.code, [])
    for text in case.problems:
        assert any(text in problem for problem in answer["problems"]), answer["problems"]
    assert done.stderr.strip().splitlines() == answer["problems"]
    assert not (tmp_path / "luthier-runs").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "twice.yaml").write_text("spec: {task: causal-lm}\nspec: {task: text-classification}\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "table.csv").write_text("text;label\na;1\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "book.xlsx").write_bytes(b"PK\x03\x04")
    files = ("missing.yaml", "broken.yaml", "twice.yaml", "rows.jsonl", "table.csv", "rows.jsonl.gz", "book.xlsx")
    done = luthier("run", *files, cwd=tmp_path)
    assert done.returncode == 64
    assert "missing.yaml: No such file or directory" in done.stderr
    assert "broken.yaml: not YAML" in done.stderr
    assert "twice.yaml: not YAML: 'spec' is given twice; keep one of them" in done.stderr
    assert "rows.jsonl: a dataset, not a manifest; name it in spec.dataset.files" in done.stderr
    assert "table.csv: a dataset, not a manifest; name it in spec.dataset.files" in done.stderr
    assert "rows.jsonl.gz: a dataset, not a manifest; name it in spec.dataset.files" in done.stderr
    assert "book.xlsx: not text, and so no manifest; give the file of a job" in done.stderr


SCALARS = [
    # written        read as kubectl does
    ("1e-4", 1e-4),
    ("1E+3", 1000.0),
    (".5", 0.5),
    ("1_000", 1000),
    ("012", 10),
    ("0o17", 15),
    ("y", True),
    ("off", False),
    ("12:30:45", "12:30:45"),
    ("2026-03-01", "2026-03-01"),
    ("~", None),
    ("'1e-4'", "1e-4"),
]


@pytest.mark.parametrize(("written", "expect"), SCALARS, ids=[s[0] for s in SCALARS])
def test_a_word_of_yaml_is_what_kubectl_makes_of_it(written: str, expect: object) -> None:
    read = yaml.load(f"a: {written}", StrictLoader)["a"]
    assert (read, type(read)) == (expect, type(expect))


@pytest.mark.parametrize("written", [".inf", "-.Inf", ".nan", "1e999"])
def test_a_number_that_json_cannot_say_is_refused(written: str) -> None:
    with pytest.raises(yaml.YAMLError, match="JSON cannot express it"):
        yaml.load(f"a: {written}", StrictLoader)


CLASSES = '{"h100": {"nodeSelector": {"gpu": "h100"}, "maxPerPod": 8}}'
POLICIES = '{"*": {"defaults": {"gpuClass": "h100"}, "maxima": {"gpus": 8}}}'
PROFILES = {"LUTHIER_GPU_CLASSES": CLASSES, "LUTHIER_NAMESPACE_POLICIES": POLICIES}


def test_profiles_hold_for_render_and_plan() -> None:
    """With the settings of an operator in the environment, both answer as it would."""
    job = yaml.safe_dump(changed(FINE_TUNE, {"spec.resources.gpusPerNode": 8, "spec.training.batchSize": 8}))
    drawn = list(yaml.safe_load_all(luthier("render", "-", stdin=job, **PROFILES).stdout))
    (group,) = [o for o in drawn if o["kind"] == "JobSet"]
    pod = group["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    planned = yaml.safe_load(luthier("plan", "--quick", "-", stdin=job, **PROFILES).stdout.partition("---\n")[0])
    assert planned["spec"]["resources"]["gpuClass"] == "h100"

    greedy = yaml.safe_dump(
        changed(FINE_TUNE, {"spec.resources": {"nodes": 2, "gpusPerNode": 8}, "spec.training.batchSize": 16})
    )
    for words in (("render", "-"), ("plan", "--quick", "-")):
        refused = luthier(*words, stdin=greedy, **PROFILES)
        assert refused.returncode == 64
        assert "sound: spec.resources.gpusPerNode: 16 GPUs at once (2 pods with 8 each), but a job" in refused.stderr
        assert luthier(*words, stdin=greedy).returncode == 0


def test_plan_quick_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    job = changed(FINE_TUNE, {"spec.resources": {"nodes": 2, "gpusPerNode": 8}, "spec.training": {"batchSize": 16}})
    done = luthier("plan", "--quick", "-", "-o", "json", cwd=tmp_path, stdin=yaml.safe_dump(job))
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)["jobs"]
    assert answer["phases"] == ["prepare", "run"]
    assert answer["run"] == {"pods": 2, "atOnce": 2, "processes": 16, "gpus": 16, "strategy": "auto"}
    assert answer["spec"]["training"]["learningRate"] == 2e-4
    # The defaults that depend on task and method are shown, too.
    assert answer["spec"]["training"]["maxLength"] == 1024
    assert answer["spec"]["method"] == {
        "type": "lora",
        "rank": 16,
        "alpha": 32,
        "dropout": 0.0,
        "targetModules": ["all-linear"],
        "rslora": False,
        "dora": False,
        "bias": "none",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-class", "a100-80g,h1000"], "--gpu-class h1000: not known. Known are b200, h200,"),
        (["--gpu-class", "bare"], "--gpu-class bare: its memory is not described; add gpuClasses.*.memory"),
        (["--quick", "--gpu-classes", "missing.yaml"], "--gpu-classes missing.yaml: describes no classes of GPUs:"),
    ],
)
def test_classes_that_cannot_be_compared(words: list[str], message: str) -> None:
    job = yaml.safe_dump(changed(FINE_TUNE, {"spec.resources.gpusPerNode": 1}))
    refused = luthier("plan", "-", *words, stdin=job, LUTHIER_GPU_CLASSES='{"bare": {"maxPerPod": 8}}')
    assert refused.returncode == 64
    assert refused.stderr.startswith(message)


def test_classes_are_compared_for_jobs_with_gpus() -> None:
    job = yaml.safe_dump(changed(FINE_TUNE, {"spec.resources.gpusPerNode": 0}))
    refused = luthier("plan", "-", "--gpu-class", "l4", stdin=job)
    assert (refused.returncode, refused.stderr) == (
        64,
        "--gpu-class: sound requests no GPUs; set spec.resources.gpusPerNode\n",
    )


def test_render_draws_what_the_operator_applies(tmp_path: Path) -> None:
    hub = {"spec.hub": {"repo": "org/out", "tokenSecretRef": {"name": "hf"}}}
    done = luthier(
        "render", write(tmp_path, changed(FINE_TUNE, hub), changed(GENERATE, {"metadata.name": "texts"})), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    drawn = [(o["kind"], o["metadata"]["name"]) for o in yaml.safe_load_all(done.stdout)]
    assert drawn == [
        ("ConfigMap", "ftj-sound"),
        ("PersistentVolumeClaim", "ftj-sound"),
        ("Job", "ftj-sound-prepare"),
        ("JobSet", "ftj-sound-run"),
        ("Job", "ftj-sound-publish"),
        ("ConfigMap", "gj-texts"),
        ("PersistentVolumeClaim", "gj-texts"),
        ("Job", "gj-texts-prepare"),
        ("Job", "gj-texts-run"),
    ]
    assert "run.json: |" in done.stdout


@dataclass(frozen=True)
class DifferenceCase:
    name: str
    before: Document
    after: Document
    expect: str | None


DIFFERENCES = [
    DifferenceCase(
        name="nothing",
        before={},
        after={},
        expect=None,
    ),
    DifferenceCase(
        name="a field",
        before={"training": {"epochs": 1}},
        after={"training": {"epochs": 2}},
        expect="spec.training.epochs was 1 and is 2",
    ),
    DifferenceCase(
        name="a field that is new",
        before={"model": {"id": "a"}},
        after={"model": {"path": "a"}},
        expect="spec.model.id was 'a' and is None",
    ),
]


@pytest.mark.parametrize("case", DIFFERENCES, ids=lambda case: case.name)
def test_difference(case: DifferenceCase) -> None:
    assert difference(case.before, case.after) == case.expect


def test_every_path_of_the_api_is_known() -> None:
    """A new field of type Path must be found, or it would not be mapped to this machine."""
    from luthier_api.crd import crd
    from luthier_api.kinds import KINDS

    def fields(node: Document, path: str) -> set[str]:
        if "properties" in node:
            return {f for name, below in node["properties"].items() for f in fields(below, f"{path}.{name}")}
        if isinstance(node.get("items"), dict):
            return fields(node["items"], f"{path}[0]")
        return {path} if node.get("type") == "string" and node.get("maxLength") == 1024 else set()

    full = {
        "FineTuneJob": {
            "model": {"path": "/m"},
            "dataset": {
                "files": ["/a"],
                "evalFiles": ["/b"],
                "chatTemplate": {"file": "/c"},
                "mix": {"sources": [{"files": ["/d"]}]},
            },
            "grpo": {"rewards": [{"type": "model", "model": {"path": "/r"}, "file": "/r.py"}]},
        },
        "GenerateJob": {
            "model": {"path": "/m"},
            "adapters": [{"path": "/a"}],
            "image": {"refiner": {"path": "/r"}, "safety": {"path": "/s"}},
            "inputs": {
                "dataset": {"files": ["/a"]},
                "rows": [{"image": "/i", "initImage": "/j", "mask": "/k", "audio": "/l"}],
            },
        },
    }
    for kind, info in KINDS.items():
        spec = crd(kind, info)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        assert {field for field, _, _ in paths_in(full[kind.value])} == fields(spec, "spec")


@dataclass(frozen=True)
class ProgressCase:
    progress: Progress
    expect: str


WORDS = [
    ProgressCase(
        progress=Progress(step=120, max_steps=400, loss=2.3456, tokens_per_second=5210.4, eta_seconds=58),
        expect="step 120/400  loss 2.346  5,210 tokens/s  58 s left",
    ),
    ProgressCase(
        progress=Progress(step=1, max_steps=2, loss=1.0, rows_per_second=40.71),
        expect="step 1/2  loss 1.000  40.7 rows/s",
    ),
    ProgressCase(
        progress=Progress(rows=6, max_rows=20, eta_seconds=3700),
        expect="6/20 outputs  1 h 1 min left",
    ),
    ProgressCase(
        progress=Progress(step=0, max_steps=10),
        expect="step 0/10",
    ),
]


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case.expect)
def test_describe(case: ProgressCase) -> None:
    assert describe(case.progress) == case.expect


@pytest.mark.parametrize(
    ("seconds", "expect"), [(0.4, "0 s"), (59.4, "59 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, expect: str) -> None:
    assert duration(seconds) == expect


def test_descendants_are_found_across_sessions() -> None:
    code = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'],"
        " start_new_session=True)\nprint('up', flush=True)\nimport time; time.sleep(30)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    below = descendants(parent.pid)
    import os
    import signal

    for pid in [*below, parent.pid]:
        os.kill(pid, signal.SIGKILL)
    parent.wait()
    assert len(below) == 1


def test_a_comparison_of_classes_is_all_that_is_printed() -> None:
    plan = {
        "strategy": "none",
        "worldSize": 1,
        "microBatchSize": 8,
        "accumulationSteps": 2,
        "memory": {"gpuBytes": 20 * 10**9, "gpu": {"weights": 20 * 10**9}},
        "seconds": 90.5,
        "gpuHours": 0.0251,
    }
    classes = [
        {"gpuClass": "l4", "memory": 24 * 10**9, "fits": False, "message": "too small"},
        {"gpuClass": "a100", "memory": 80 * 10**9, "fits": True, "plan": plan},
    ]
    table, note = shown({"kind": "FineTuneJob"}, {"classes": classes, "assumptions": ["rows are long"]})
    assert isinstance(table, Table)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["class"] == ["l4", "a100"]
    assert columns["peak"] == ["does not fit", "20.0 GB"]
    assert columns["time"] == ["", "1 min 30 s"]
    assert note == "note: rows are long"

    written, _, reason = shown({"kind": "FineTuneJob", "uses": []}, {"plan": plan, "notEstimated": "why not"})
    assert (written, reason) == ("kind: FineTuneJob\n---", "note: why not")
