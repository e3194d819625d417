"""Where models and datasets come from: the Hub at a commit, and the results of other jobs, merged where they are
adapters.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.faults import Fault
from hub.server import Running
from peft import LoraConfig, PeftModel, get_peft_model
from prepared_workspace import loaded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import labels
from luthier_trainer.data.load import Loader
from luthier_trainer.generation.engines.text import load_model
from luthier_trainer.methods.apply import weights_options
from luthier_trainer.models.sources import files_to_load
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.manifest import write_manifest
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
MakeGenerateRun = Callable[..., GenerateRun]
CONFIGS = ["config.json", "tokenizer.json"]
HALF = [
    f"unet/diffusion_pytorch_model.{n}"
    for n in ("fp16-00001-of-00002.safetensors", "fp16-00002-of-00002.safetensors", "safetensors.index.fp16.json")
]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@dataclass(frozen=True)
class ChoiceCase:
    name: str
    files: list[str]  # of the repository
    expect: list[str] | str  # files that are loaded, or the refusal
    components: list[str] = field(default_factory=list)  # of a pipeline


CHOICES = [
    ChoiceCase(
        name="one file of weights",
        files=[*CONFIGS, "model.safetensors", "README.md"],
        expect=[*CONFIGS, "model.safetensors"],
    ),
    ChoiceCase(
        name="the same weights as pickles",
        files=[*CONFIGS, "model.safetensors", "pytorch_model.bin", "tf_model.h5"],
        expect=[*CONFIGS, "model.safetensors"],
    ),
    ChoiceCase(
        name="shards with an index",
        files=[
            *CONFIGS,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
        expect=[
            *CONFIGS,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
    ),
    ChoiceCase(
        name="weights for another program",
        files=[*CONFIGS, "model.safetensors", "consolidated.safetensors", "original/x.safetensors"],
        expect=[*CONFIGS, "model.safetensors"],
    ),
    ChoiceCase(
        name="an adapter",
        files=ADAPTER,
        expect=ADAPTER,
    ),
    ChoiceCase(
        name="a model and an adapter",
        files=[*CONFIGS, "model.safetensors", *ADAPTER],
        expect=[*CONFIGS, "model.safetensors"],
    ),
    ChoiceCase(
        name="a model in shards and an adapter",
        files=[*CONFIGS, "model-00001-of-00001.safetensors", *ADAPTER],
        expect=[*CONFIGS, "model-00001-of-00001.safetensors"],
    ),
    ChoiceCase(
        name="an adapter with the configuration of its model",
        files=[*CONFIGS, *ADAPTER],
        expect=[*CONFIGS, *ADAPTER],
    ),
    ChoiceCase(
        name="code is left where it is",
        files=[*CONFIGS, "modeling_x.py", "model.safetensors"],
        expect=[*CONFIGS, "model.safetensors"],
    ),
    ChoiceCase(
        name="pickles only",
        files=[*CONFIGS, "pytorch_model.bin"],
        expect="spec.model.id: model a/b has its weights only as pytorch_model.bin. Files that can run code",
    ),
    ChoiceCase(
        name="no weights",
        files=CONFIGS,
        expect="spec.model.id: model a/b has no weights (*.safetensors)",
    ),
    ChoiceCase(
        name="no model",
        files=["x.safetensors"],
        expect="spec.model.id: model a/b has neither config.json nor adapter_config.json",
    ),
    ChoiceCase(
        name="a pipeline in two precisions",
        files=[
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "scheduler/scheduler_config.json",
            "sd_xl.safetensors",
            "vae_onnx/model.onnx",
        ],
        components=["unet", "vae", "scheduler"],
        expect=[
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "scheduler/scheduler_config.json",
        ],
    ),
    ChoiceCase(
        name="a pipeline whose half precision is in shards",
        files=[
            "model_index.json",
            "unet/config.json",
            *HALF,
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            *[n.replace("unet", "vae") for n in HALF],
        ],
        components=["unet", "vae"],
        expect=[
            "model_index.json",
            "unet/config.json",
            *HALF,
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ],
    ),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case.name)
def test_which_files_are_loaded(case: ChoiceCase) -> None:
    if isinstance(case.expect, str):
        with pytest.raises(Failure) as failure:
            files_to_load(case.files, case.components, "spec.model.id", "model a/b")
        assert failure.value.message.startswith(case.expect)
    else:
        assert sorted(files_to_load(case.files, case.components, "spec.model.id", "model a/b")) == sorted(case.expect)


def test_an_adapter_is_taken_from_beside_a_model_where_an_adapter_is_asked_for() -> None:
    names = [*CONFIGS, "model.safetensors", *ADAPTER]
    assert sorted(files_to_load(names, [], "spec.adapters[0].id", "model a/b", adapter=True)) == sorted(
        [*CONFIGS, *ADAPTER]
    )


@pytest.fixture(scope="session")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training scripts leave it: a model into which an adapter was merged, and the adapter. Read-only."""
    folder = tmp_path_factory.mktemp("both")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def own_logits(folder: Path, tiny_model: Path) -> torch.Tensor:
    """Of the weights in model.safetensors, loaded by name: nothing of transformers looks for adapters here."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return logits_of(model)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(torch.arange(20)[None]).logits
    return logits


def test_the_weights_of_a_model_do_not_get_an_adapter_that_lies_beside_them(
    both: Path, make_run: MakeRun, make_generate_run: MakeGenerateRun, tiny_model: Path
) -> None:
    expect = own_logits(both, tiny_model)
    for run in (make_run(model={"path": str(both)}), make_generate_run(model={"path": str(both)})):
        notices.forget()
        main(run)
        assert [
            n
            for n in notices.given()
            if n.startswith(
                f"spec.model.path: {both} has an adapter (adapter_config.json) beside the weights of a model"
            )
        ]
        assert read_prepared(run).model_path == str(both)
    options = weights_options(Method(type="full"), "fp32", False, torch.device("cpu"))
    trained = loaded("causal-lm", both, **options).model
    assert all(weight.requires_grad for weight in trained.parameters())
    for model in (trained, load_model(both, torch.float32, torch.device("cpu"))):
        torch.testing.assert_close(logits_of(model), expect)


def test_a_job_goes_on_from_an_adapter_whose_base_has_one_beside_it(
    both: Path, make_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    """Both adapters count once: the one that was merged, and the one that the first job has trained."""
    source = tmp_path / "ftj-first-1"
    finish_job(source, str(both), True, tiny_model)
    run = make_run(model={"job": "first"}, sources={"first": str(source)})
    main(run)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.load_state_dict(load_file(both / "model.safetensors"))
    expect = logits_of(PeftModel.from_pretrained(model, source / "result"))
    again = AutoModelForCausalLM.from_pretrained(read_prepared(run).model_path)
    torch.testing.assert_close(logits_of(again), expect, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_hub_with_an_adapter_beside_it(
    both: Path, make_generate_run: MakeGenerateRun, hub: Running, tiny_model: Path
) -> None:
    """As a model it is its own weights; under adapters it is the adapter."""
    hub.store.seed("model", "org/both", both)
    hub.store.seed("model", "org/tiny", tiny_model)
    notices.forget()
    run = make_generate_run(model={"id": "org/both"})
    main(run)
    assert [
        n
        for n in notices.given()
        if n.startswith(
            "spec.model.id: model org/both has an adapter (adapter_config.json) beside the weights of a model"
        )
    ]
    model = load_model(Path(read_prepared(run).model_path), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), own_logits(both, tiny_model))
    with_adapter = make_generate_run("other", model={"id": "org/tiny"}, adapters=[{"id": "org/both"}])
    main(with_adapter)
    (adapter,) = read_prepared(with_adapter).adapter_paths
    assert sorted(path.name for path in Path(adapter).glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_a_model_of_the_hub_is_fixed_to_a_commit(make_run: MakeRun, hub: Running, tiny_model: Path) -> None:
    commit = hub.store.seed("model", "org/tiny", tiny_model)
    run = make_run(model={"id": "org/tiny"})
    main(run)
    record = read_prepared(run)
    assert (record.model.source, record.model.revision) == ("org/tiny", commit.oid)
    assert record.model_path == str(WorkspaceFolder(Path(run.workspace)).prepared / "model")
    assert (Path(record.model_path) / "model.safetensors").read_bytes() == (
        tiny_model / "model.safetensors"
    ).read_bytes()


@dataclass(frozen=True)
class NotGivenCase:
    name: str
    model: dict[str, Any]
    code: ExitCode
    message: str
    token: str = ""


NOT_GIVEN = [
    NotGivenCase(
        name="no such model",
        model={"id": "org/none"},
        code=ExitCode.NOT_FOUND,
        message="spec.model.id: there is no model org/none on HUB, or it is private: then set spec.hub.tokenSecretRef",
    ),
    NotGivenCase(
        name="no such model, with a token",
        model={"id": "org/none"},
        token="hf_reader",
        code=ExitCode.NOT_FOUND,
        message="spec.model.id: there is no model org/none on HUB",
    ),
    NotGivenCase(
        name="no such revision",
        model={"id": "org/tiny", "revision": "v9"},
        code=ExitCode.NOT_FOUND,
        message="spec.model.revision: model org/tiny on HUB has no such branch, tag or commit",
    ),
    NotGivenCase(
        name="gated",
        model={"id": "org/gated"},
        token="hf_reader",
        code=ExitCode.UNAUTHORIZED,
        message="spec.model.id: model org/gated on HUB is gated. Ask for access there",
    ),
    NotGivenCase(
        name="a wrong token",
        model={"id": "org/tiny"},
        token="hf_wrong",
        code=ExitCode.UNAUTHORIZED,
        message="spec.hub.tokenSecretRef: the Hub refused the token for model org/tiny on HUB",
    ),
    NotGivenCase(
        name="an adapter for a model",
        model={"id": "org/adapter"},
        code=ExitCode.INVALID_SPEC,
        message="spec.model.id: that is an adapter, not a model; set its base model 'org/tiny' there",
    ),
]


@pytest.mark.parametrize("case", NOT_GIVEN, ids=lambda case: case.name)
def test_what_the_hub_does_not_give(
    case: NotGivenCase,
    make_run: MakeRun,
    hub: Running,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/tiny"}')
    shutil.copy(tiny_model / "model.safetensors", adapter / "adapter_model.safetensors")
    hub.store.seed("model", "org/tiny", tiny_model)
    hub.store.seed("model", "org/adapter", adapter)
    hub.store.seed("model", "org/gated", tiny_model, gated=True)
    if case.token:
        monkeypatch.setenv(Variables.TOKEN, case.token)
    with pytest.raises(Failure) as failure:
        main(make_run(model=case.model))
    expect = case.message.replace("HUB", hub.url)
    assert (failure.value.code, failure.value.message[: len(expect)]) == (case.code, expect)


def test_a_hub_that_is_away_is_no_mistake_of_the_user(
    make_run: MakeRun, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "0.5")
    hub.control.faults.append(Fault(status=503))
    with pytest.raises(Failure, match=r"spec\.model\.id: model org/tiny on .* cannot be reached") as failure:
        main(make_run(model={"id": "org/tiny"}))
    assert failure.value.code is ExitCode.HUB_UNAVAILABLE


@pytest.fixture
def rows_on_hub(hub: Running, corpus_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit of dataset org/rows: 100 rows to train on, 20 to test with."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)  # read once, when `datasets` is imported
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = corpus_rows.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:100]))
    (folder / "test.jsonl").write_text("".join(lines[100:120]))
    return str(hub.store.seed("dataset", "org/rows", folder).oid)


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_fixed_to_a_commit(make_run: MakeRun, rows_on_hub: str, tmp_path: Path) -> None:
    """As the pod runs it, from PID 1 down."""
    run = make_run(dataset={"id": "org/rows", "split": "train[:50%]", "evalSplit": "test"})
    (tmp_path / "run.json").write_text(json.dumps(run.dump()))
    done = subprocess.run(
        [sys.executable, "-m", "luthier_trainer", "prepare", "--run", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = TerminationMessage.read((tmp_path / "run" / "termination-log").read_text())
    assert done.returncode == 0, done.stderr
    assert said is not None
    assert said.prepared is not None
    assert (said.prepared.dataset.rows, said.prepared.dataset.eval_rows, said.prepared.dataset.revision) == (
        50,
        20,
        rows_on_hub,
    )


CARD = (
    "---\nconfigs: [{config_name: default, data_files: x.csv}]\ndataset_info: {features: [{name: text, dtype: string},"
    " {name: label, dtype: %s}]}\n---\n"
)


@dataclass(frozen=True)
class HubFileCase:
    name: str
    files: dict[str, str]  # of the repository
    expect: list[tuple[str, str]] | str  # text and label of each row, or how the message begins
    dataset: dict[str, Any] = field(default_factory=dict)


HUB_FILES = [
    HubFileCase(
        name="TSV with ordinary quotation marks",
        files={"train.tsv": 'text\tlabel\n"a\t007\nb"\t7\nc\t7\n'},
        expect=[('"a', "007"), ('b"', "7"), ("c", "7")],
    ),
    HubFileCase(
        name="an unquoted comma",
        files={"train.csv": "text,label\na, b,c\n"},
        expect="spec.dataset.id: row 0, counted from 0 (line 2 of ",
    ),
    HubFileCase(
        name="semicolons, by the spec",
        files={"train.csv": "text;label\na, b;c\nd;e\n"},
        dataset={"csv": {"separator": "semicolon"}},
        expect=[("a, b", "c"), ("d", "e")],
    ),
    HubFileCase(
        name="classes, by the card",
        files={
            "x.csv": "text,label\na,pos\nb,neg\n",
            "README.md": CARD % "{class_label: {names: {'0': pos, '1': neg}}}",
        },
        expect=[("a", "pos"), ("b", "neg")],
    ),
    HubFileCase(
        name="rows that are not of the card's type",
        files={"x.csv": "text,label\na,pos\nb,neg\n", "README.md": CARD % "int64"},
        expect="spec.dataset.id: the rows do not have the types that the dataset's card names",
    ),
    HubFileCase(
        name="Latin letters, by the spec",
        files={"train.csv": "text,label\na,b\nc,d\n"},
        dataset={"encoding": "cp1252"},
        expect=[("a", "b"), ("c", "d")],
    ),
    HubFileCase(
        name="how CSV is written, for JSON",
        files={"train.jsonl": '{"text": "a"}'},
        dataset={"csv": {}},
        expect="spec.dataset.csv: belongs to files of the format csv, and org/d is read as json",
    ),
]


@pytest.mark.parametrize("case", HUB_FILES, ids=lambda case: case.name)
def test_files_of_the_hub_are_read_as_those_of_a_volume(
    case: HubFileCase, hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)  # read once, when `datasets` is imported
    folder = tmp_path / "dataset"
    folder.mkdir()
    for file, content in case.files.items():
        (folder / file).write_text(content)
    hub.store.seed("dataset", "org/d", folder)
    loader = Loader(
        TrainingData.model_validate({"id": "org/d"} | case.dataset),
        "spec.dataset",
        tmp_path / "cache",
        columns=("text", "label"),
        others=False,
    )
    if isinstance(case.expect, str):
        with pytest.raises(Failure) as failure:
            loader.split("train", "split")
        assert failure.value.message.startswith(case.expect)
        return
    rows = loader.split("train", "split")
    names = labels.names_of(rows, "label", "f", merge=False)
    assert [
        (row["text"], names[i])
        for row, i in zip(rows.data, labels.ids_of(rows, "label", "f", names, merge=False), strict=True)
    ] == case.expect


@dataclass(frozen=True)
class NoRowsCase:
    name: str
    dataset: dict[str, Any]
    code: ExitCode
    message: str


NO_ROWS = [
    NoRowsCase(
        name="no such dataset",
        dataset={"id": "org/none"},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.id: there is no dataset org/none on HUB",
    ),
    NoRowsCase(
        name="no such split",
        dataset={"split": "validation"},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.split: there is no split 'validation'; the splits are: test, train",
    ),
    NoRowsCase(
        name="no such configuration",
        dataset={"name": "german"},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.name: BuilderConfig 'german' not found. Available: ['default']",
    ),
    NoRowsCase(
        name="no such revision",
        dataset={"revision": "v9"},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.revision: dataset org/rows on HUB has no such branch, tag or commit",
    ),
    NoRowsCase(
        name="no such column",
        dataset={"columns": {"text": "txt"}},
        code=ExitCode.INVALID_DATASET,
        message=(
            'spec.dataset.columns.text: no column "txt" in org/rows, split train (columns: text, label). Did you mean'
            ' "text"?'
        ),
    ),
]


@pytest.mark.parametrize("case", NO_ROWS, ids=lambda case: case.name)
def test_a_dataset_that_the_hub_does_not_give(
    case: NoRowsCase, make_run: MakeRun, hub: Running, rows_on_hub: str
) -> None:
    with pytest.raises(Failure) as failure:
        main(make_run(dataset={"id": "org/rows"} | case.dataset))
    expect = case.message.replace("HUB", hub.url)
    assert (failure.value.code, failure.value.message[: len(expect)]) == (case.code, expect)


def finish_job(folder: Path, base: str, adapter: bool, tiny_model: Path, revision: str | None = None) -> torch.Tensor:
    """The workspace of a FineTuneJob that has ended well; the logits of what it learnt. `revision`: of its model."""
    workspace = WorkspaceFolder(folder)
    workspace.prepared.mkdir(parents=True)
    shutil.copytree(tiny_model, workspace.prepared / "model")
    record = PreparedRecord(
        model=ResolvedSource(source=base, revision=revision),
        dataset=ResolvedDataset(source="d", rows=1),
        plan=Plan(strategy="none"),
        model_path=base,
        dataset_path="d",
    )
    workspace.prepared_record.write_text(json.dumps(record.dump()))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        )
    model.save_pretrained(workspace.result)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(workspace.result)
    write_manifest(workspace.result)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.arange(20)[None]).logits
    return logits


@dataclass(frozen=True)
class JobResultCase:
    name: str
    adapter: bool
    base: str
    expect: str


JOB_RESULTS = [
    JobResultCase(
        name="a whole model",
        adapter=False,
        base="/workspace/ftj-first-1234abcd/prepared/model",
        expect="SOURCE/result",
    ),
    JobResultCase(
        name="an adapter on a model of its own workspace",
        adapter=True,
        base="/workspace/ftj-first-1234abcd/prepared/model",
        expect="WORKSPACE/prepared/model",
    ),
    JobResultCase(
        name="an adapter on a model that both see",
        adapter=True,
        base="MODEL",
        expect="WORKSPACE/prepared/model",
    ),
]


@pytest.mark.parametrize("case", JOB_RESULTS, ids=lambda case: case.name)
def test_the_result_of_another_job_is_a_model(
    case: JobResultCase, make_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "sources" / "claim" / "ftj-first-1234abcd"
    logits = finish_job(source, case.base.replace("MODEL", str(tiny_model)), case.adapter, tiny_model)
    run = make_run(model={"job": "first"}, sources={"first": str(source)})
    main(run)
    record = read_prepared(run)
    assert record.model_path == case.expect.replace("SOURCE", str(source)).replace("WORKSPACE", run.workspace)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(record.model_path).eval()(torch.arange(20)[None]).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    assert record.model.source == "FineTuneJob first"


def test_a_classifier_keeps_its_head_and_its_labels(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    """The head is in the adapter, and the names of the classes in the configuration beside it."""
    workspace = WorkspaceFolder(tmp_path / "ftj-first-1")
    workspace.prepared.mkdir(parents=True)
    labels = ["class", "other"]
    record = PreparedRecord(
        model=ResolvedSource(source="m"),
        dataset=ResolvedDataset(source="d", rows=1, labels=labels),
        plan=Plan(strategy="none"),
        model_path=str(tiny_model),
        dataset_path="d",
    )
    workspace.prepared_record.write_text(json.dumps(record.dump()))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, id2label=dict(enumerate(labels)))
    model = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(workspace.result)
    base.config.save_pretrained(workspace.result)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(workspace.result)
    write_manifest(workspace.result)
    run = make_run(task="text-classification", model={"job": "first"}, sources={"first": str(workspace.root)})
    notices.forget()
    main(run)
    assert "spec.model: its head is for the same labels (class, other) and is kept" in notices.given()
    again = AutoModelForSequenceClassification.from_pretrained(read_prepared(run).model_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(torch.arange(9)[None]).logits, model.eval()(torch.arange(9)[None]).logits, rtol=1e-4, atol=1e-5
        )
    assert again.config.id2label == dict(enumerate(labels))


def test_an_adapter_whose_base_is_nowhere(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "ftj-first-1"
    finish_job(source, "/models/elsewhere", True, tiny_model)
    with pytest.raises(
        Failure,
        match=r"spec\.model\.job: the result of FineTuneJob first is an adapter, and its base model /models/elsewhere",
    ):
        main(make_run(model={"job": "first"}, sources={"first": str(source)}))


def test_a_damaged_result_is_not_built_upon(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "ftj-first-1"
    finish_job(source, str(tiny_model), True, tiny_model)
    (source / "result" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(
        Failure,
        match=r"spec\.model\.job: the result of FineTuneJob first is damaged: adapter_model.safetensors has 0 bytes",
    ):
        main(make_run(model={"job": "first"}, sources={"first": str(source)}))


def test_a_job_without_a_result(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(
        Failure, match=r"spec\.model\.job: FineTuneJob first has left no result in .* Has it finished\?"
    ):
        main(make_run(model={"job": "first"}, sources={"first": str(tmp_path)}))


def test_adapters_keep_their_order(make_generate_run: MakeGenerateRun, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        finish_job(tmp_path / name, str(tiny_model), True, tiny_model)
    run = make_generate_run(
        adapters=[{"job": "two"}, {"path": str(tmp_path / "one" / "result")}],
        sources={"two": str(tmp_path / "two"), "one": str(tmp_path / "one")},
    )
    main(run)
    record = read_prepared(run)
    assert record.adapter_paths == [str(tmp_path / "two" / "result"), str(tmp_path / "one" / "result")]
    assert [a.source for a in record.adapters] == ["FineTuneJob two", str(tmp_path / "one" / "result")]


@dataclass(frozen=True)
class BaseCase:
    name: str
    base: str  # model that the adapter's job recorded
    revision: str  # its commit
    refusal: str | None  # None: accepted


BASES = [
    BaseCase(
        name="the same commit",
        base="org/tiny",
        revision="COMMIT",
        refusal=None,
    ),
    BaseCase(
        name="a folder, which no commit can be compared with",
        base="/models/tiny",
        revision="5" * 64,
        refusal=None,
    ),
    BaseCase(
        name="a commit of long ago",
        base="org/tiny",
        revision="0" * 40,
        refusal=(
            f"org/tiny has changed since FineTuneJob one was trained on it (then {'0' * 40}, now COMMIT). Set"
            f" spec.model.revision: {'0' * 40}"
        ),
    ),
    BaseCase(
        name="another model",
        base="org/other",
        revision="0" * 40,
        refusal=(
            "FineTuneJob one was trained on org/other, and spec.model is org/tiny. Set spec.model to the former, or"
            " leave the adapter out and set model: {job: one}, which has both"
        ),
    ),
]


@pytest.mark.parametrize("case", BASES, ids=lambda case: case.name)
def test_an_adapter_of_a_model_of_the_hub(
    case: BaseCase, make_generate_run: MakeGenerateRun, hub: Running, tiny_model: Path, tmp_path: Path
) -> None:
    commit = hub.store.seed("model", "org/tiny", tiny_model).oid
    finish_job(tmp_path / "one", case.base, True, tiny_model, case.revision.replace("COMMIT", commit))
    run = make_generate_run(model={"id": "org/tiny"}, adapters=[{"job": "one"}], sources={"one": str(tmp_path / "one")})
    if case.refusal is None:
        main(run)
        return
    with pytest.raises(Failure) as failure:
        main(run)
    assert failure.value.message == f"spec.adapters[0].job: {case.refusal.replace('COMMIT', commit)}"


def test_a_whole_model_is_no_adapter(make_generate_run: MakeGenerateRun, tiny_model: Path, tmp_path: Path) -> None:
    finish_job(tmp_path / "one", str(tiny_model), False, tiny_model)
    with pytest.raises(
        Failure,
        match=r"spec\.adapters\[0\]\.job: that is a whole model, not an adapter .* use it as spec\.model\.job: one",
    ):
        main(make_generate_run(adapters=[{"job": "one"}], sources={"one": str(tmp_path / "one")}))
