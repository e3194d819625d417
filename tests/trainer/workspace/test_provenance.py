"""What a job was built on and is another by now: data that was edited, results that were made anew, adapters of another
base.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models.new_model import new_config, save_new_model
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import START_OVER, Failure
from luthier_trainer.supervisor import preflight
from luthier_trainer.training.checkpoint import identity
from luthier_trainer.workspace.manifest import write_manifest
from luthier_trainer.workspace.prepared import read_prepared
from luthier_trainer.workspace.provenance import folder_digest

MakeRun = Callable[..., FineTuneRun]
MakeGenerateRun = Callable[..., GenerateRun]
OLD = f" since this job was prepared, and what the job has made is of the old. {START_OVER}"


def refusal(run: FineTuneRun | GenerateRun) -> str:
    with pytest.raises(Failure) as failure:
        main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC
    return failure.value.message


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts)


def touch(data: Path) -> None:
    os.utime(data / "a.jsonl", ns=(1, 1))


def copy(data: Path) -> None:
    """As a volume that is mounted anew."""
    shutil.copy(data / "a.jsonl", data / "a.jsonl.new")
    (data / "a.jsonl.new").replace(data / "a.jsonl")


@dataclass(frozen=True)
class ChangedDataCase:
    name: str
    happens: Callable[[Path], object]  # to the data, after it was prepared
    refusal: str | None  # None: accepted


SINCE = [
    ChangedDataCase(
        name="nothing",
        happens=lambda data: None,
        refusal=None,
    ),
    ChangedDataCase(
        name="other dates",
        happens=touch,
        refusal=None,
    ),
    ChangedDataCase(
        name="a copy",
        happens=copy,
        refusal=None,
    ),
    ChangedDataCase(
        name="all of it gone",
        happens=shutil.rmtree,
        refusal=None,
    ),
    ChangedDataCase(
        name="another file beside it",
        happens=lambda data: (data / "z.txt").write_text("z"),
        refusal=None,
    ),
    ChangedDataCase(
        name="a row more",
        happens=lambda data: (data / "a.jsonl").write_text(lines("one", "two", "three")),
        refusal="spec.dataset.files: {data}/a.jsonl has changed",
    ),
    ChangedDataCase(
        name="as many bytes",
        happens=lambda data: (data / "b.jsonl").write_text(lines("three", "fivr")),
        refusal="spec.dataset.files: {data}/b.jsonl has changed",
    ),
    ChangedDataCase(
        name="a file more",
        happens=lambda data: (data / "c.jsonl").write_text(lines("six")),
        refusal="spec.dataset.files: {data}/c.jsonl has come",
    ),
    ChangedDataCase(
        name="a file less",
        happens=lambda data: (data / "b.jsonl").unlink(),
        refusal="spec.dataset.files: {data}/b.jsonl has gone",
    ),
    ChangedDataCase(
        name="other rows to measure on",
        happens=lambda data: (data / "eval").write_text(lines("x x")),
        refusal="spec.dataset.evalFiles: {data}/eval has changed",
    ),
]


@pytest.mark.parametrize("case", SINCE, ids=lambda case: case.name)
def test_data_since_it_was_prepared(case: ChangedDataCase, make_run: MakeRun, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file, texts in {"a.jsonl": ("one", "two"), "b.jsonl": ("three", "four"), "eval": ("held", "out")}.items():
        (data / file).write_text(lines(*texts))
    run = make_run(dataset={"files": [str(data / "*.jsonl")], "evalFiles": [str(data / "eval")], "format": "jsonl"})
    first = main(run)
    case.happens(data)
    if case.refusal is None:
        assert main(run) == first
    else:
        assert refusal(run) == case.refusal.format(data=data) + OLD


def test_edited_prompts(make_generate_run: MakeGenerateRun, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    run = make_generate_run(inputs={"dataset": {"files": [str(tmp_path / "p.txt")]}})
    main(run)
    (tmp_path / "p.txt").write_text("two\n")
    assert refusal(run) == f"spec.inputs.dataset.files: {tmp_path}/p.txt has changed{OLD}"


class Jobs:
    """FineTuneJobs of one folder: prepared as always, and ended by hand, because what they learn does not matter
    here.
    """

    def __init__(self, make_run: MakeRun, make_generate_run: MakeGenerateRun, tiny_model: Path, root: Path) -> None:
        self.make_run, self.make_generate_run, self.tiny_model, self.root = (
            make_run,
            make_generate_run,
            tiny_model,
            root,
        )

    @property
    def sources(self) -> dict[str, str]:
        return {p.name: str(p) for p in (self.root / "workspace").glob("*")}

    def base(self, name: str, seed: int = 1, seconds: float = 1.0, layers: int = 2) -> Path:
        """The result of a full training; made anew when there is one."""
        result = WorkspaceFolder(self.root / "workspace" / name).result
        shutil.rmtree(result, ignore_errors=True)
        shutil.copytree(self.tiny_model, result)
        config = AutoModelForCausalLM.from_pretrained(self.tiny_model).config
        config.num_hidden_layers = layers
        save_new_model(config, result, seed)
        (result / "metrics.json").write_text(json.dumps({"seconds": seconds}))
        write_manifest(result)
        return result

    def adapter(self, name: str, model: dict[str, str], task: str = "causal-lm") -> Path:
        """The result of a LoRA job on `model`."""
        run = self.make_run(name, task=task, model=model, sources=self.sources)
        main(run)
        record, result = read_prepared(run), WorkspaceFolder(Path(run.workspace)).result
        auto, kind = (
            (AutoModelForCausalLM, "CAUSAL_LM")
            if task == "causal-lm"
            else (AutoModelForSequenceClassification, "SEQ_CLS")
        )
        torch.manual_seed(len(name))
        lora = LoraConfig(task_type=kind, r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(auto.from_pretrained(record.model_path), lora).save_pretrained(result)
        AutoTokenizer.from_pretrained(self.tiny_model).save_pretrained(result)
        write_manifest(result)
        return result

    def generate(self, model: dict[str, str], *adapters: dict[str, str], name: str = "gen") -> GenerateRun:
        return self.make_generate_run(name, model=model, adapters=list(adapters), sources=self.sources)


@pytest.fixture
def jobs(make_run: MakeRun, make_generate_run: MakeGenerateRun, tiny_model: Path, tmp_path: Path) -> Jobs:
    return Jobs(make_run, make_generate_run, tiny_model, tmp_path)


def test_a_result_made_anew_is_another_model(jobs: Jobs, tmp_path: Path) -> None:
    """Refused by `prepare`, by a run that would go on, and as the run of an older checkpoint."""
    result = jobs.base("b0")
    run = jobs.make_run("ad1", model={"job": "b0"}, sources=jobs.sources)
    first = main(run)
    before = identity(run, read_prepared(run))
    assert before["the model's revision"] == folder_digest(result)
    jobs.base("b0", seconds=2.0)
    assert main(run) == first  # the same weights: nothing has changed but the time that it took
    jobs.base("b0", seed=2)
    message = f"spec.model.job: {result} has changed{OLD}"
    assert refusal(run) == message
    with pytest.raises(Failure) as failure:
        preflight.check("train", run)
    assert failure.value.message == message
    other = jobs.make_run("ad1-again", model={"job": "b0"}, sources=jobs.sources)
    main(other)
    assert identity(other, read_prepared(other))["the model's revision"] != before["the model's revision"]


def test_a_merged_adapter_is_the_runs_own(jobs: Jobs, tmp_path: Path) -> None:
    """What a run has in its workspace does not change under it; a result that is to be made of the new one is another
    job's.
    """
    jobs.base("b0")
    jobs.adapter("ad1", {"job": "b0"})
    run = jobs.make_run("ad2", model={"job": "ad1"}, sources=jobs.sources)
    main(run)
    result = WorkspaceFolder(tmp_path / "workspace" / "ad1").result
    (result / "tokenizer_config.json").write_text("{}")
    write_manifest(result)
    preflight.check("train", run)
    assert refusal(run) == f"spec.model.job: {result} has changed{OLD}"


def test_a_folder_that_somebody_trained_into(jobs: Jobs, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    run = jobs.make_run(model={"path": str(tmp_path / "m")})
    first = main(run)
    (tmp_path / "m" / "README.md").write_text("a model")
    os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    assert main(run) == first
    save_new_model(new_config_of(tiny_model), tmp_path / "m", seed=2)
    assert refusal(run) == f"spec.model.path: {tmp_path}/m has changed{OLD}"


def new_config_of(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model).config


def test_an_adapter_is_not_merged_into_a_base_made_anew(jobs: Jobs) -> None:
    jobs.base("b0")
    jobs.adapter("ad1", {"job": "b0"})
    jobs.base("b0", seed=2)
    expect = (
        "spec.model.job: the result of FineTuneJob ad1 is an adapter, and its base model, FineTuneJob b0, has changed"
        " since it was trained. Run ad1 again"
    )
    assert refusal(jobs.make_run("ad2", model={"job": "ad1"}, sources=jobs.sources)) == expect
    assert refusal(jobs.generate({"job": "ad1"})) == expect


def made_anew(jobs: Jobs) -> None:
    jobs.base("b0", seed=2)


def anything(jobs: Jobs) -> None:
    pass


NOT_ITS_OWN = (
    "spec.adapters[0].job: FineTuneJob {0} was trained on FineTuneJob {1}, and spec.model is FineTuneJob {2}. Set"
    " spec.model to the former, or leave the adapter out and set model: {{job: {0}}}, which has both"
)


@dataclass(frozen=True)
class PairCase:
    name: str
    happens: Callable[[Jobs], None]  # to the jobs, before this one starts
    model: dict[str, str]
    adapters: list[dict[str, str]]
    refusal: str | None  # None: accepted


PAIRS = [
    PairCase(
        name="an adapter on its base",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"job": "ad1"}],
        refusal=None,
    ),
    PairCase(
        name="the second on the first",
        happens=anything,
        model={"job": "ad1"},
        adapters=[{"job": "ad2"}],
        refusal=None,
    ),
    PairCase(
        name="the same base by its path",
        happens=anything,
        model={"path": "ROOT/b0/result"},
        adapters=[{"job": "ad1"}],
        refusal=None,
    ),
    PairCase(
        name="the adapter by its path",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"path": "ROOT/ad1/result"}],
        refusal=None,
    ),
    PairCase(
        name="an adapter twice",
        happens=anything,
        model={"job": "ad1"},
        adapters=[{"job": "ad1"}],
        refusal=NOT_ITS_OWN.format("ad1", "b0", "ad1"),
    ),
    PairCase(
        name="one between them is missing",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"job": "ad2"}],
        refusal=NOT_ITS_OWN.format("ad2", "ad1", "b0"),
    ),
    PairCase(
        name="one between them is missing, by its path",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"path": "ROOT/ad2/result"}],
        refusal=(
            "spec.adapters[0].path: the adapter was trained on ROOT/ad2/prepared/model, and spec.model is FineTuneJob"
            " b0. Set spec.model to the former"
        ),
    ),
    PairCase(
        name="a classifier's",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"job": "cls"}],
        refusal=(
            "spec.adapters[0].job: the adapter was trained for text-classification, and text-generation needs one for"
            " causal-lm. Name another, or remove it"
        ),
    ),
    PairCase(
        name="a classifier's, by its path",
        happens=anything,
        model={"job": "b0"},
        adapters=[{"path": "ROOT/cls/result"}],
        refusal=(
            "spec.adapters[0].path: the adapter was trained for text-classification, and text-generation needs one for"
            " causal-lm. Name another, or remove it"
        ),
    ),
    PairCase(
        name="its base was made anew",
        happens=made_anew,
        model={"job": "b0"},
        adapters=[{"job": "ad1"}],
        refusal="spec.adapters[0].job: FineTuneJob b0 has changed since FineTuneJob ad1 was trained on it",
    ),
]


@pytest.mark.parametrize(
    "case",
    quick(
        PAIRS,
        "an adapter on its base",
        "the second on the first",
        "one between them is missing",
        "its base was made anew",
    ),
)
def test_an_adapter_and_a_model(case: PairCase, jobs: Jobs, tmp_path: Path) -> None:
    root = str(tmp_path / "workspace")
    jobs.base("b0")
    jobs.adapter("ad1", {"job": "b0"})
    jobs.adapter("ad2", {"job": "ad1"})
    jobs.adapter("cls", {"job": "b0"}, task="text-classification")
    case.happens(jobs)

    def here(source: dict[str, str]) -> dict[str, str]:
        return {k: v.replace("ROOT", root) for k, v in source.items()}

    run = jobs.generate(here(case.model), *map(here, case.adapters))
    if case.refusal is None:
        main(run)
    else:
        expect = case.refusal.replace("ROOT", root)
        assert refusal(run)[: len(expect)] == expect


@dataclass(frozen=True)
class ForeignCase:
    name: str
    fields: dict[str, int]
    message: str


FOREIGN = [
    ForeignCase(
        name="narrower",
        fields={"intermediate_size": 48},
        message="model.layers.0.mlp.down_proj has 64 inputs there, and 48 in the adapter",
    ),
    ForeignCase(
        name="with other heads",
        fields={"head_dim": 8},
        message="model.layers.0.self_attn.q_proj has 32 outputs there, and 16 in the adapter",
    ),
    ForeignCase(
        name="deeper",
        fields={"num_hidden_layers": 3},
        message="which has no module model.layers.2.mlp.down_proj",
    ),
]


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
def test_an_adapter_of_a_model_that_is(
    case: ForeignCase, make_generate_run: MakeGenerateRun, tiny_model: Path, tmp_path: Path
) -> None:
    config = new_config_of(tiny_model)
    for field, value in case.fields.items():
        setattr(config, field, value)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_config(config), lora).save_pretrained(tmp_path / "adapter")
    said = refusal(make_generate_run(adapters=[{"path": str(tmp_path / "adapter")}]))
    assert said.startswith(f"spec.adapters[0].path: the adapter does not fit {tiny_model}")
    assert case.message in said
    assert said.endswith("Name the model it was trained on")


def test_an_adapter_fits_whatever_its_linear_modules_are_called(
    make_generate_run: MakeGenerateRun, tiny_model: Path, tmp_path: Path
) -> None:
    """GPT-2's are transposed."""
    from luthier_api.spec import NewModel

    shutil.copytree(tiny_model, tmp_path / "gpt2")
    config = new_config(
        NewModel(model_type="gpt2", parameters={"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64})
    )
    config.vocab_size = 512
    save_new_model(config, tmp_path / "gpt2", seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    assert (
        main(
            make_generate_run(model={"path": str(tmp_path / "gpt2")}, adapters=[{"path": str(tmp_path / "adapter")}])
        ).code
        == 0
    )
