"""`luthier run`: order, ends, stops, going on. The phases are processes; here a stand-in plays the supervisor
(`stand_in`).

The real one runs the quickstart in `tests/trainer` and in `make demo`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases.api import FINE_TUNE, GENERATE, Document, changed
from cases.program import luthier, start

from luthier_api.run import read_run
from luthier_cli.screen import other_metrics

STAND_IN = Path(__file__).with_name("stand_in")
CPU = {"gpusPerNode": 0}
PATIENCE = 90  # seconds, on a machine that has other things to do
PROGRESS = (
    "luthier_train_step 6\nluthier_train_max_steps 12\nluthier_train_loss 2.5\nluthier_train_tokens_per_second 1234\n"
)


@dataclass
class Laptop:
    """A folder, and `luthier` in it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.folder / "luthier-runs"

    def script(self, **steps: Document) -> None:
        """What the supervisors will do: `train_0={"code": 70}`."""
        self.runs.mkdir(exist_ok=True)
        (self.runs / "script.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in steps.items()}))

    def write(self, *documents: Document, name: str = "job.yaml") -> str:
        (self.folder / name).write_text(yaml.safe_dump_all(documents))
        return name

    @property
    def variables(self) -> dict[str, str]:
        return {"PYTHONPATH": str(STAND_IN), "HF_TOKEN_PATH": str(self.folder / "no-login")} | self.env

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`luthier` as a process, which can be sent signals."""
        return start(*words, cwd=self.folder, **self.variables)

    def run(self, *words: str) -> tuple[int, str, str]:
        done = luthier(*words, cwd=self.folder, **self.variables)
        return done.returncode, done.stdout, done.stderr

    def json(self, *words: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = self.run(*words, "-o", "json")
        return code, json.loads(out)

    def calls(self) -> list[str]:
        file = self.runs / "calls.jsonl"
        return (
            [f"{c['job']} {c['verb']} {c['rank']}" for c in map(json.loads, file.read_text().splitlines())]
            if file.exists()
            else []
        )


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laptop:
    """The stand-in's phases take a tenth of a second, so they are looked at more often than those of real jobs."""
    monkeypatch.setattr("luthier_cli.runner.POLL_SECONDS", 0.02)
    monkeypatch.setattr("luthier_cli.runner.PROGRESS_SECONDS", 0.1)
    laptop = Laptop(tmp_path)
    laptop.script()
    return laptop


def job(name: str = "tune", **spec: Any) -> Document:
    named = {"metadata.name": name, "spec.dataset": {"id": "org/data"}, "spec.resources": CPU}
    return changed(FINE_TUNE, named | {f"spec.{field}": value for field, value in spec.items()})


def outputs(name: str = "make", **spec: Any) -> Document:
    return changed(
        GENERATE,
        {"metadata.name": name, "spec.resources": {"gpus": 0}}
        | {f"spec.{field}": value for field, value in spec.items()},
    )


def test_phases_in_order_and_a_summary(laptop: Laptop) -> None:
    laptop.script(train_0={"metrics": PROGRESS})
    code, out, err = laptop.run("run", laptop.write(job()))
    assert (code, err) == (0, "")
    assert laptop.calls() == ["tune prepare 0", "tune train 0"]
    for text in (
        "FineTuneJob tune",
        "org/model @ 0123456789ab, 1,000 weights",
        "90 rows, 10 held out",
        "12 steps, 2 processes, ddp, batch 4 × 1 × 2",
        "50 %  step 6/12  loss 2.500  1,234 tokens/s",
        "7.500 → 2.250  (perplexity 9.5)",
        "12 steps, 3,000 tokens in 5 s",
        "luthier-runs/tune/result",
    ):
        assert text in out, out
    run = read_run((laptop.runs / "tune/run.json").read_bytes())
    assert (run.workspace, run.metrics_port) == (str(laptop.runs / "tune"), 0)
    assert "train 0 says hello" in (laptop.runs / "tune/logs/run-0.log").read_text()


def test_several_jobs_one_using_the_result_of_another(laptop: Laptop) -> None:
    file = laptop.write(
        job("base"),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}},
        job("next", model={"job": "base"}),
    )
    last = laptop.write(outputs("texts", model={"job": "base"}, adapters=[{"job": "next"}], shards=2), name="last.yaml")
    code, document = laptop.json("run", file, last)
    assert code == document["code"] == 0
    assert laptop.calls() == [
        "base prepare 0",
        "base train 0",
        "next prepare 0",
        "next train 0",
        "texts prepare 0",
        "texts generate 0",
        "texts generate 1",
    ]
    assert [j["state"] for j in document["jobs"]] == ["Complete"] * 3
    assert document["jobs"][0]["metrics"]["evalLoss"] == 2.25
    run = read_run((laptop.runs / "texts/run.json").read_bytes())
    assert run.sources == {name: str(laptop.runs / name) for name in ("base", "next")}


def test_the_outputs_of_a_job_are_the_inputs_of_another_one(laptop: Laptop) -> None:
    """In one call, or where an earlier one has left them."""
    following = outputs("next", inputs={"job": "texts", "columns": {"prompt": "text"}})
    code, _ = laptop.json("run", laptop.write(outputs("texts", shards=2), following))
    assert code == 0
    assert laptop.calls()[-2:] == ["next prepare 0", "next generate 0"]
    run = read_run((laptop.runs / "next/run.json").read_bytes())
    assert run.sources == {"GenerateJob/texts": str(laptop.runs / "texts")}

    alone = laptop.write({**following, "metadata": {"name": "alone"}}, name="alone.yaml")
    assert laptop.json("run", alone)[0] == 66
    result = laptop.runs / "texts/result"
    result.mkdir(exist_ok=True)
    for shard in range(2):
        (result / f"shard-0000{shard}-of-00002.MANIFEST.json").write_text("{}")
    assert laptop.json("run", alone)[0] == 0


def test_texts_are_shown(laptop: Laptop) -> None:
    _, out, _ = laptop.run("run", laptop.write(outputs(shards=2)))
    assert "Once▸ upon 0" in out
    assert "Once▸ upon 1" in out


def test_nodes_are_processes_that_work_at_once(laptop: Laptop) -> None:
    code, _ = laptop.json("run", laptop.write(job(resources={"gpusPerNode": 0, "nodes": 2})))
    assert code == 0
    assert sorted(laptop.calls()) == ["tune prepare 0", "tune train 0", "tune train 1"]


@dataclass(frozen=True)
class FailureCase:
    name: str
    script: Document
    code: int
    reason: str
    message: str


FAILURES = [
    FailureCase(
        name="a mistake in the data",
        script={"prepare-0": {"code": 65, "message": "spec.dataset.columns.text: no column"}},
        code=65,
        reason="InvalidDataset",
        message="spec.dataset.columns.text: no column",
    ),
    FailureCase(
        name="an error in the training",
        script={"train-0": {"code": 70, "message": "it broke"}},
        code=70,
        reason="TrainingError",
        message="it broke",
    ),
    FailureCase(
        name="a supervisor that is killed",
        script={"train-0": {"dies": True}},
        code=71,
        reason="InfrastructureError",
        message="was killed by SIGKILL",
    ),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
def test_failure(laptop: Laptop, case: FailureCase) -> None:
    (laptop.runs / "script.json").write_text(json.dumps(case.script))
    ended, document = laptop.json("run", laptop.write(job(), job("after")))
    first, second = document["jobs"]
    assert (ended, document["code"], first["code"], first["reason"]) == (case.code, case.code, case.code, case.reason)
    assert case.message in first["message"]
    assert "says hello" in first["lastLines"]
    assert (first["state"], second["state"], second["code"]) == ("Failed", "NotRun", 0)


def test_failure_for_people_names_the_log(laptop: Laptop) -> None:
    laptop.script(train_0={"code": 70, "message": "it broke"})
    code, out, _ = laptop.run("run", laptop.write(job()))
    assert code == 70
    assert "TrainingError (70): it broke" in out
    assert "train 0 says hello" in out
    assert "logs: luthier-runs/tune/logs" in out


def test_the_node_to_blame_gives_the_code(laptop: Laptop) -> None:
    laptop.script(
        train_0={"code": 81, "message": "peer lost"}, train_1={"code": 71, "message": "the disk", "seconds": 0.5}
    )
    code, document = laptop.json("run", laptop.write(job(resources={"gpusPerNode": 0, "nodes": 2})))
    assert code == 71
    assert document["jobs"][0]["message"] == "the disk"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_saves_and_the_same_command_goes_on(laptop: Laptop, number: int) -> None:
    laptop.script(train_0={"until_stopped": True})
    file = laptop.write(job(), job("after"))
    process = laptop.start("run", file, "-o", "json")
    wait_for(lambda: "tune train 0" in laptop.calls())
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    document = json.loads(out)
    assert process.returncode == document["code"] == 75
    assert [j["state"] for j in document["jobs"]] == ["Stopped", "NotRun"]
    assert document["jobs"][0]["message"] == "saved at step 7"

    laptop.script()
    code, document = laptop.json("run", file)
    assert code == 0
    assert [j["state"] for j in document["jobs"]] == ["Complete", "Complete"]
    assert laptop.calls() == ["tune prepare 0", "tune train 0", "tune train 0", "after prepare 0", "after train 0"]


def test_a_second_ctrl_c_ends_everything(laptop: Laptop) -> None:
    laptop.script(train_0={"deaf": 600})
    process = laptop.start("run", laptop.write(job()))
    wait_for(lambda: "tune train 0" in laptop.calls())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals at once would be one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75


def test_what_is_complete_is_not_done_again(laptop: Laptop) -> None:
    file = laptop.write(job())
    laptop.run("run", file)
    code, document = laptop.json("run", file)
    assert (code, document["jobs"][0]["state"], document["jobs"][0]["metrics"]["evalLoss"]) == (0, "Complete", 2.25)
    assert document["jobs"][0]["finishedBefore"]
    assert "already finished: nothing was run" in laptop.run("run", file)[1]
    assert len(laptop.calls()) == 2


def test_only_the_shard_that_failed_runs_again(laptop: Laptop) -> None:
    laptop.script(generate_1={"code": 71})
    file = laptop.write(outputs(shards=2))
    assert laptop.json("run", file)[0] == 71
    laptop.script()
    assert laptop.json("run", file)[0] == 0
    assert laptop.calls() == ["make prepare 0", "make generate 0", "make generate 1", "make generate 1"]


def test_figures_are_those_of_all_shards_and_failed_rows_are_told(laptop: Laptop) -> None:
    laptop.script(generate_0={"failed": 1})
    file = laptop.write(outputs(shards=3))
    code, document = laptop.json("run", file)
    assert (code, document["jobs"][0]["metrics"]) == (0, {"rows": 3, "failedRows": 1, "seconds": 6})
    assert "3; 1 failed" in laptop.run("run", file)[1]


def test_texts_with_every_kind_of_line_break(laptop: Laptop) -> None:
    laptop.script(generate_0={"writes": "\u2028and\u0085on"})
    code, out, err = laptop.run("run", laptop.write(outputs()))
    assert (code, err) == (0, "")
    assert "Once▸ upon 0" in out


def test_a_mistake_that_prepare_found_is_mended_in_place(laptop: Laptop) -> None:
    laptop.script(prepare_0={"code": 65, "message": "spec.dataset.columns.text: no column"})
    assert laptop.run("run", laptop.write(job(dataset={"id": "org/data", "columns": {"text": "txt"}})))[0] == 65
    laptop.script()
    mended = laptop.write(job(dataset={"id": "org/data", "columns": {"text": "text"}}))
    assert laptop.run("plan", mended)[0] == 0
    assert laptop.run("plan", laptop.write(job(dataset={"id": "org/more"})))[0] == 0
    assert laptop.calls() == ["tune prepare 0"] * 3
    run = read_run((laptop.runs / "tune/run.json").read_bytes())
    assert run.spec.dataset.id == "org/more"  # type: ignore[union-attr]


@dataclass(frozen=True)
class UnusableCase:
    name: str
    workspace: str
    message: str
    code: int


UNUSABLE = [
    UnusableCase(
        name="a file for a workspace",
        workspace="not-a-folder",
        message="--workspace: ",
        code=78,
    ),
    UnusableCase(
        name="a workspace that cannot be made",
        workspace="/proc/nope",
        message="--workspace: /proc/nope",
        code=78,
    ),
]


@pytest.mark.parametrize("case", UNUSABLE, ids=lambda case: case.name)
def test_an_unusable_workspace_is_told_in_a_line(laptop: Laptop, case: UnusableCase) -> None:
    (laptop.folder / "not-a-folder").write_text("")
    ended, _, err = laptop.run("run", laptop.write(job()), "--workspace", case.workspace)
    assert (ended, len(err.strip().splitlines())) == (case.code, 1), err
    assert case.message in err


def test_a_run_config_of_another_version_is_told_in_a_line(laptop: Laptop) -> None:
    (laptop.runs / "tune").mkdir()
    (laptop.runs / "tune/run.json").write_text('{"kind": "FineTuneJob", "odd": 1}')
    file = laptop.write(job())
    code, _, err = laptop.run("run", file)
    assert (code, len(err.strip().splitlines())) == (64, 1), err
    assert "run.json: not a run config of this version" in err
    assert laptop.run("run", file, "--fresh")[0] == 0


def test_another_manifest_does_not_go_on_from_this_one(laptop: Laptop) -> None:
    laptop.run("run", laptop.write(job()))
    file = laptop.write(job(training={"epochs": 2}))
    code, _, err = laptop.run("run", file)
    assert code == 64
    assert "spec.training.epochs was 1.0 and is 2.0" in err
    assert "--fresh" in err
    code, _ = laptop.json("run", file, "--fresh")
    assert code == 0
    assert laptop.calls() == ["tune prepare 0", "tune train 0"] * 2


def test_another_layout_is_planned_again(laptop: Laptop) -> None:
    laptop.run("plan", laptop.write(job()))
    assert laptop.run("run", laptop.write(job(training={"microBatchSize": 1})))[0] == 0
    assert laptop.calls() == ["tune prepare 0", "tune prepare 0", "tune train 0"]


def test_a_manifest_whose_circumstances_have_changed_goes_on(laptop: Laptop) -> None:
    laptop.run("run", laptop.write(job()))
    changed_one = job(training={"saveSteps": 7}, resources=CPU | {"memory": "1Gi"}, scheduling={"queueName": "team-a"})
    code, document = laptop.json("run", laptop.write(changed_one))
    assert (code, document["jobs"][0]["finishedBefore"]) == (0, True)
    assert laptop.calls() == ["tune prepare 0", "tune train 0"]


def test_fresh_empties_no_folder_of_others(laptop: Laptop) -> None:
    (laptop.runs / "tune").mkdir()
    (laptop.runs / "tune/thesis.tex").write_text("precious")
    code, _, err = laptop.run("run", laptop.write(job()), "--fresh")
    assert code == 64
    assert "luthier did not create it" in err
    assert (laptop.runs / "tune/thesis.tex").exists()


def test_two_at_once_in_one_folder(laptop: Laptop) -> None:
    laptop.script(train_0={"until_stopped": True})
    file = laptop.write(job())
    first = laptop.start("run", file)
    wait_for(lambda: "tune train 0" in laptop.calls())
    code, _, err = laptop.run("run", file)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=PATIENCE)
    assert code == 74
    assert "another luthier process is working in" in err


def test_credentials_go_only_to_the_phases_that_need_them(laptop: Laptop) -> None:
    secret = {"name": "mlflow", "keys": {"token": "token"}}
    tracking = [{"type": "mlflow", "url": "http://mlflow", "secretRef": secret}]
    stores = [{"type": "az", "account": "lutes", "secretRef": {"name": "az", "keys": {"accountKey": "key"}}}]
    hub = {"repo": "org/out", "tokenSecretRef": {"name": "hf"}}
    file = laptop.write(job(hub=hub, tracking=tracking, stores=stores))
    code, _, err = laptop.run("run", file)
    assert code == 77
    assert "spec.hub.tokenSecretRef: here the token comes from the environment: export HF_TOKEN=..." in err
    assert (
        "spec.tracking.secretRef: here credentials come from the environment: export MLFLOW_TRACKING_TOKEN=..., or"
        " remove secretRef"
    ) in err
    assert (
        "spec.stores.secretRef: here credentials come from the environment: export AZURE_STORAGE_ACCOUNT_KEY=..., or"
        " remove secretRef"
    ) in err
    laptop.env = {
        "HF_TOKEN": "hf_example",
        "MLFLOW_TRACKING_TOKEN": "of-the-tracker",
        "AZURE_STORAGE_ACCOUNT_KEY": "of-the-store",
    }
    code, document = laptop.json("run", file)
    assert (code, document["jobs"][0]["hub"]["revision"]) == (0, "fedcba9876543210")
    calls = [json.loads(line) for line in (laptop.runs / "calls.jsonl").read_text().splitlines()]
    assert [(c["verb"], c["token"], c["trackerToken"], c["storeKey"]) for c in calls] == [
        ("prepare", "hf_example", None, "of-the-store"),
        ("train", None, "of-the-tracker", None),
        ("publish", "hf_example", None, None),
    ]
    written = (laptop.runs / "tune/run.json").read_text()
    assert not {"hf_example", "of-the-tracker", "of-the-store"} & set(written.split('"'))


def test_a_login_is_a_token(laptop: Laptop) -> None:
    (laptop.folder / "token").write_text("hf_example")
    laptop.env = {"HF_TOKEN_PATH": str(laptop.folder / "token")}
    code, document = laptop.json("run", laptop.write(job(hub=HUB)))
    assert (code, document["jobs"][0]["state"], laptop.calls()[-1]) == (0, "Complete", "tune publish 0")


HUB: Document = {"repo": "org/out", "tokenSecretRef": {"name": "hf"}}


@dataclass(frozen=True)
class HubCase:
    name: str
    hub: Document
    again: bool


HUBS = [
    HubCase(
        name="nothing",
        hub=HUB,
        again=False,
    ),
    HubCase(
        name="a default, said",
        hub=HUB | {"branch": "main", "private": True},
        again=False,
    ),
    HubCase(
        name="the repository",
        hub=HUB | {"repo": "org/other"},
        again=True,
    ),
    HubCase(
        name="the branch",
        hub=HUB | {"branch": "trial"},
        again=True,
    ),
    HubCase(
        name="the token",
        hub=HUB | {"tokenSecretRef": {"name": "another"}},
        again=True,
    ),
    HubCase(
        name="who may see it",
        hub=HUB | {"private": False},
        again=True,
    ),
]


@pytest.mark.parametrize("case", HUBS, ids=lambda case: case.name)
def test_a_result_is_published_again_where_its_place_has_changed(laptop: Laptop, case: HubCase) -> None:
    laptop.env = {"HF_TOKEN": "hf_example"}
    assert laptop.run("run", laptop.write(job(hub=HUB)))[0] == 0
    code, document = laptop.json("run", laptop.write(job(hub=case.hub)))
    assert (code, document["jobs"][0]["finishedBefore"]) == (0, not case.again)
    assert laptop.calls() == ["tune prepare 0", "tune train 0", "tune publish 0"] + ["tune publish 0"] * case.again
    assert laptop.json("run", laptop.write(job(hub=case.hub)))[1]["jobs"][0]["finishedBefore"]


def test_plan_stops_after_prepare_and_run_goes_on(laptop: Laptop) -> None:
    file = laptop.write(job())
    code, document = laptop.json("plan", file)
    assert (code, document["jobs"][0]["state"]) == (0, "Planned")
    assert document["jobs"][0]["prepared"]["plan"]["steps"] == 12
    assert laptop.json("run", file)[0] == 0
    assert laptop.calls() == ["tune prepare 0", "tune train 0"]


PLANS = [
    # done before       what is said beside what was found
    ("nothing", "✓ prepare"),
    ("plan", "already prepared: nothing was checked again"),
    ("run", "already finished: nothing was run"),
]


@pytest.mark.parametrize(("before", "says"), PLANS, ids=[p[0] for p in PLANS])
def test_a_plan_shows_what_was_found_whenever_it_was(laptop: Laptop, before: str, says: str) -> None:
    file = laptop.write(job())
    if before != "nothing":
        assert laptop.run(before, file)[0] == 0
    code, out, _ = laptop.run("plan", file)
    assert code == 0
    assert [out.count(text) for text in (says, "90 rows, 10 held out", "12 steps, 2 processes")] == [1, 1, 1], out


def test_notices_are_shown_after_their_phase_and_stand_in_the_document(laptop: Laptop) -> None:
    file, text = laptop.write(job()), "spec.dataset: 3 rows are left out"
    laptop.script(prepare_0={"notices": [text]}, train_0={"notices": [text, "spec.model: its head is new"]})
    code, out, _ = laptop.run("plan", file)
    assert (code, out.count(text)) == (0, 1)
    assert laptop.run("plan", file)[1].count(text) == 1, "also where prepare has nothing left to do"
    assert laptop.json("run", file)[1]["jobs"][0]["notices"] == [text, "spec.model: its head is new"]


def test_a_plan_needs_neither_the_gpus_nor_the_token_of_the_run(laptop: Laptop) -> None:
    asked = job(resources={"gpusPerNode": 8}, hub={"repo": "org/out", "tokenSecretRef": {"name": "hf"}})
    code, document = laptop.json("plan", laptop.write(asked))
    assert (code, document["jobs"][0]["state"], laptop.calls()) == (0, "Planned", ["tune prepare 0"])


def test_a_plan_of_a_job_whose_source_is_only_planned_is_refused_with_what_to_do(laptop: Laptop) -> None:
    first = laptop.write(job())
    second = laptop.write(job(model={"job": "tune"}) | {"metadata": {"name": "second"}}, name="second.yaml")
    code, _, err = laptop.run("plan", first, second)
    assert code == 66
    assert "spec.model.job: no finished FineTuneJob 'tune' in" in err
    assert "run it first: a job that was only planned has no result" in err
    assert laptop.run("run", first)[0] == 0
    assert laptop.run("plan", first, second)[0] == 0


@dataclass(frozen=True)
class SteeredCase:
    name: str
    spec: Document
    state: str
    calls: list[str]


STEERED = [
    SteeredCase(
        name="plan only",
        spec={"planOnly": True},
        state="Planned",
        calls=["tune prepare 0"],
    ),
    SteeredCase(
        name="suspended",
        spec={"suspend": True},
        state="Suspended",
        calls=[],
    ),
]


@pytest.mark.parametrize("case", STEERED, ids=lambda case: case.name)
def test_fields_that_steer(laptop: Laptop, case: SteeredCase) -> None:
    code, document = laptop.json("run", laptop.write(job(**case.spec)))
    assert (code, document["jobs"][0]["state"], laptop.calls()) == (0, case.state, case.calls)


def test_paths_relative_to_the_manifest_and_mounts(laptop: Laptop) -> None:
    (laptop.folder / "sub").mkdir()
    files = ["rows.csv", "/data/more/rows.csv", "/elsewhere/rows.csv"]
    volumes = [{"claimName": "c", "mountPath": "/data"}]
    file = laptop.write(job(dataset={"files": files}, volumes=volumes), name="sub/job.yaml")
    code, _, err = laptop.run("run", file)
    assert code == 66
    assert "spec.dataset.files[1]: /data/more/rows.csv is on a volume of the cluster" in err
    assert "--mount /data=FOLDER" in err
    assert laptop.run("run", file, "--mount", "/data=mine")[0] == 0
    run = read_run((laptop.runs / "tune/run.json").read_bytes())
    assert run.spec.dataset.files == [
        str(laptop.folder / "sub/rows.csv"),
        str(laptop.folder / "mine/more/rows.csv"),
        "/elsewhere/rows.csv",
    ]  # type: ignore[union-attr]


GPUS_OF_NODES = [
    # resources                        GPUs that each node sees, of 4,5,6,7
    ({"nodes": 2, "gpusPerNode": 2}, {0: "4,5", 1: "6,7"}),
    ({"gpusPerNode": 2}, {0: "4,5"}),
    ({"gpusPerNode": 1}, {0: "4"}),
]


@pytest.mark.parametrize(("resources", "gpus"), GPUS_OF_NODES)
def test_each_node_sees_the_gpus_that_it_asks_for(
    laptop: Laptop, resources: dict[str, int], gpus: dict[int, str]
) -> None:
    laptop.env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert laptop.run("run", laptop.write(job(resources=resources)))[0] == 0
    calls = [json.loads(line) for line in (laptop.runs / "calls.jsonl").read_text().splitlines()]
    assert {c["rank"]: c["gpus"] for c in calls if c["verb"] == "train"} == gpus


def test_each_shard_sees_the_gpu_that_it_asks_for(laptop: Laptop) -> None:
    """Shards run one after another, so all of them get the first GPU."""
    laptop.env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    manifest = changed(GENERATE, {"spec.shards": 2, "spec.resources": {"gpus": 1}})
    assert laptop.run("run", laptop.write(manifest))[0] == 0
    calls = [json.loads(line) for line in (laptop.runs / "calls.jsonl").read_text().splitlines()]
    assert [(c["rank"], c["gpus"]) for c in calls if c["verb"] == "generate"] == [(0, "4"), (1, "4")]


def wait_for(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_the_summary_has_a_line_for_each_metric_of_the_tables() -> None:
    """`rewardAccuracy` of preference; accuracy and perplexity stand on lines that say more."""
    metrics = {"accuracy": 0.9, "perplexity": 9.5, "evalLoss": 2.25, "rewardAccuracy": 0.7, "rewardMargin": 0.02}
    assert other_metrics(metrics) == {"rewardAccuracy": 0.7, "rewardMargin": 0.02}
