"""The weights of a model's folder: what transformers would silently draw at random is refused, or put right and
said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_workspace import loaded
from safetensors.torch import load_file, save_file
from trainer.conftest import MakeRun
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import inspect, weight_check, weight_files
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.prepared import read_prepared

FIELD = "spec.model.path"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
Weights = dict[str, torch.Tensor]


def changed(folder: Path, into: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A copy of a model with other weights, and other values in its config.json."""
    shutil.copytree(folder, into)
    save_file(change(load_file(into / "model.safetensors")), into / "model.safetensors", metadata={"format": "pt"})
    path = into / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return into


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": weight for name, weight in weights.items()}


def rows_added(rows: int) -> Callable[[Weights], Weights]:
    """An embedding of more rows than config.json says."""

    def change(weights: Weights) -> Weights:
        return {n: torch.cat([w, w[:rows]]) if w.ndim == 2 and len(w) == 512 else w for n, w in weights.items()}

    return change


def compiled_inside(weights: Weights) -> Weights:
    """The names of a model of which only an inner module was compiled."""
    return {name.replace("model.", "model._orig_mod.", 1): weight for name, weight in weights.items()}


def fitted(path: Path, task: str, workspace: Path, named_by_adapter: bool = False) -> Path:
    folder = WorkspaceFolder(workspace)
    folder.prepared.mkdir(parents=True, exist_ok=True)
    weight_files.check(path, FIELD)
    return weight_check.fitting(path, AutoConfig.from_pretrained(path), task, FIELD, folder, named_by_adapter)


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama whose output layer is not its embedding, and three BERTs: one that fills in words, a whole one, a
    finished classifier.
    """
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = BertConfig(**SMALL)
    BertForMaskedLM(config).save_pretrained(root / "bert-mlm")
    BertForSequenceClassification(config).bert.save_pretrained(root / "bert")
    BertForSequenceClassification(BertConfig(**SMALL, num_labels=5)).save_pretrained(root / "classifier")
    return {"llama": tiny_model} | {path.name: path for path in root.iterdir()}


@dataclass(frozen=True)
class Refused:
    name: str
    model: str
    task: str
    change: Callable[[Weights], Weights]
    message: str
    """What it says after the folder."""


REFUSED = [
    Refused(
        name="a layer is absent",
        model="llama",
        task="causal-lm",
        change=without("layers.1."),
        message=(
            "does not hold 9 of the 21 weights of a LlamaForCausalLM: model.layers.1.input_layernorm.weight,"
            " model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, .... They would start with"
            " random values. Copy or download it again, or choose a model whose files are whole and named as"
            " transformers names them"
        ),
    ),
    Refused(
        name="the output layer is absent, and is not the embedding",
        model="llama",
        task="text-generation",
        change=without("lm_head"),
        message=(
            "does not hold 1 of the 21 weights of a LlamaForCausalLM: lm_head.weight. They would start with random"
            " values. Choose a model that was trained for this task; if its output layer is its embedding, set"
            " tie_word_embeddings: true in its config.json"
        ),
    ),
    Refused(
        name="names of another library",
        model="llama",
        task="causal-lm",
        change=prefixed("transformer.inner."),
        message=(
            "does not hold 21 of the 21 weights of a LlamaForCausalLM: lm_head.weight, model.embed_tokens.weight,"
            " model.layers.0.input_layernorm.weight, .... It holds 21 others (transformer.inner.lm_head.weight, "
        ),
    ),
    Refused(
        name="a prefix and a layer that is absent",
        model="llama",
        task="causal-lm",
        change=lambda weights: prefixed("_orig_mod.")(without("layers.1.")(weights)),
        message="does not hold 21 of the 21 weights of a LlamaForCausalLM",
    ),
    Refused(
        name="an embedding of other rows than vocab_size, for causal-lm",
        model="llama",
        task="causal-lm",
        change=rows_added(8),
        message=(
            "does not hold 2 of the 21 weights of a LlamaForCausalLM: lm_head.weight (520 × 32 in the files, 512 × 32"
            " by config.json), model.embed_tokens.weight (520 × 32 in the files, 512 × 32 by config.json). They would"
            " start with random values. Set vocab_size in its config.json to the rows of its embedding, or copy the"
            " files that belong together"
        ),
    ),
    Refused(
        name="an embedding of other rows than vocab_size, for a classifier",
        model="bert",
        task="text-classification",
        change=rows_added(8),
        message=(
            "does not hold 1 of the 41 weights of a BertForSequenceClassification:"
            " bert.embeddings.word_embeddings.weight (520 × 32 in the files, 512 × 32 by config.json)."
        ),
    ),
    Refused(
        name="a layer of a classifier's encoder",
        model="bert",
        task="text-classification",
        change=without("layer.0.attention.self.key"),
        message=(
            "does not hold 2 of the 41 weights of a BertForSequenceClassification:"
            " bert.encoder.layer.0.attention.self.key.bias, bert.encoder.layer.0.attention.self.key.weight. They"
        ),
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[c.name for c in REFUSED])
def test_weights_that_would_be_drawn_at_random_are_refused(
    case: Refused, models: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(models[case.model], tmp_path / "m", case.change)
    with pytest.raises(Failure) as failure:
        fitted(path, case.task, tmp_path / "w")
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(f"{FIELD}: {path} {case.message}")


@dataclass(frozen=True)
class TakenCase:
    name: str
    model: str
    task: str
    change: Any


TAKEN = [
    TakenCase(
        name="the model as it was saved",
        model="llama",
        task="causal-lm",
        change=lambda weights: weights,
    ),
    TakenCase(
        name="an output layer that a classifier has no use for",
        model="llama",
        task="text-classification",
        change=lambda weights: weights,
    ),
    TakenCase(
        name="a base without prefix",
        model="llama",
        task="text-classification",
        change=without("lm_head"),
    ),
    TakenCase(
        name="no pooler, where words were filled in",
        model="bert-mlm",
        task="text-classification",
        change=lambda weights: weights,
    ),
    TakenCase(
        name="no head",
        model="bert",
        task="text-classification",
        change=lambda weights: weights,
    ),
    TakenCase(
        name="a head for other labels",
        model="classifier",
        task="text-classification",
        change=lambda weights: weights,
    ),
]


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_only_a_head_may_be_new(case: TakenCase, models: dict[str, Path], tmp_path: Path) -> None:
    path = changed(
        models[case.model], tmp_path / "m", case.change, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}
    )
    assert fitted(path, case.task, tmp_path / "w") == path


@dataclass(frozen=True)
class WrappedCase:
    name: str
    change: Any
    prefixes: str


WRAPPED = [
    WrappedCase(
        name="torch.compile",
        change=prefixed("_orig_mod."),
        prefixes="_orig_mod.",
    ),
    WrappedCase(
        name="DDP",
        change=prefixed("module."),
        prefixes="module.",
    ),
    WrappedCase(
        name="compiled, then DDP",
        change=prefixed("module._orig_mod."),
        prefixes="_orig_mod. and module.",
    ),
    WrappedCase(
        name="an inner module",
        change=compiled_inside,
        prefixes="_orig_mod.",
    ),
]


@torch.inference_mode()
def loss(model: PreTrainedModel) -> float:
    ids = torch.arange(2, 66)[None]
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case.name)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_prefixes_of_wrappers_are_removed(
    case: WrappedCase, sharded: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(models["llama"], tmp_path / "m", case.change)
    if sharded:
        (path / "model.safetensors").unlink()
        weights = case.change(load_file(models["llama"] / "model.safetensors"))
        parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
        for file, part in parts.items():
            save_file(part, path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    right, wrong = (
        loss(AutoModelForCausalLM.from_pretrained(models["llama"])),
        loss(AutoModelForCausalLM.from_pretrained(path)),
    )
    notices.forget()
    copy = fitted(path, "causal-lm", tmp_path / "w")
    assert loss(AutoModelForCausalLM.from_pretrained(copy)) == right != wrong
    assert copy == tmp_path / "w" / "prepared" / "model"
    assert (
        AutoTokenizer.from_pretrained(copy)("class")["input_ids"]
        == AutoTokenizer.from_pretrained(path)("class")["input_ids"]
    )
    count = sum(
        "_orig_mod" in n or n.startswith("module.")
        for n in case.change(load_file(models["llama"] / "model.safetensors"))
    )
    assert notices.given() == [
        f"{FIELD}: the names of {count} of its weights begin with {case.prefixes}, which torch.compile or"
        " DistributedDataParallel put there. The job works with a copy without them; the model itself stays as it is"
    ]


def test_an_adapter_never_names_a_base_that_others_load_at_random(models: dict[str, Path], tmp_path: Path) -> None:
    path = changed(models["llama"], tmp_path / "m", prefixed("module."))
    with pytest.raises(
        Failure, match=r"begin with module\..* Whoever loads an adapter with this base would get random weights"
    ):
        fitted(path, "causal-lm", tmp_path / "w", named_by_adapter=True)


@pytest.mark.parametrize("kind", ["FineTuneJob", "GenerateJob"])
def test_prepare_of_both_kinds_asks(
    kind: str, make_run: MakeRun, make_generate_run: MakeRun, models: dict[str, Path], tmp_path: Path
) -> None:
    make = make_run if kind == "FineTuneJob" else make_generate_run
    with pytest.raises(Failure, match=r"spec\.model\.path: .* does not hold 9 of the 21 weights"):
        main(make(model={"path": str(changed(models["llama"], tmp_path / "broken", without("layers.1.")))}))
    path = changed(models["llama"], tmp_path / "compiled", prefixed("_orig_mod."))
    run = make("compiled", model={"path": str(path)})
    main(run)
    record = read_prepared(run)
    assert record.model_path == str(Path(run.workspace) / "prepared" / "model")
    assert record.origins[0].path == str(path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234567\n"
HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


@dataclass(frozen=True)
class DamagedCase:
    name: str
    file: str
    content: bytes
    message: str


DAMAGED = [
    DamagedCase(
        name="weights by git-lfs",
        file="model.safetensors",
        content=POINTER.encode(),
        message="FILE is a pointer of git-lfs, not the file that it stands for. Run `git lfs install && git lfs pull`",
    ),
    DamagedCase(
        name="a tokenizer by git-lfs",
        file="tokenizer.json",
        content=POINTER.encode(),
        message="FILE is a pointer of git-lfs",
    ),
    DamagedCase(
        name="an empty file",
        file="model.safetensors",
        content=b"",
        message="FILE (0 bytes) is no safetensors file",
    ),
    DamagedCase(
        name="cut in the header",
        file="model.safetensors",
        content=WHOLE[:30],
        message="FILE (30 bytes) is no safetensors file: its header would have 54 bytes. Copy or download it again",
    ),
    DamagedCase(
        name="cut in the weights",
        file="model.safetensors",
        content=WHOLE[:-4],
        message="FILE is cut short: it has 66 bytes, and its header asks for 70. Copy or download it again",
    ),
    DamagedCase(
        name="a web page",
        file="model.safetensors",
        content=b"<!DOCTYPE html><html>" * 9,
        message="FILE (189 bytes) is no safetensors file",
    ),
    DamagedCase(
        name="a header that is no JSON",
        file="model.safetensors",
        content=WHOLE.replace(b'"a":', b'"a";'),
        message="FILE (70 bytes) is no safetensors file",
    ),
    DamagedCase(
        name="a header without offsets",
        file="model.safetensors",
        content=WHOLE.replace(b"data_off", b"xxxx_off"),
        message="FILE (70 bytes) is no safetensors file",
    ),
    DamagedCase(
        name="a shape that does not fit",
        file="model.safetensors",
        content=WHOLE.replace(b"[2]", b"[3]"),
        message="FILE is damaged",
    ),
]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_a_damaged_file_is_named(case: DamagedCase, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / case.file).write_bytes(case.content)
    with pytest.raises(Failure) as failure:
        weight_files.check(tmp_path / "m", FIELD)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(f"{FIELD}: {case.message.replace('FILE', str(tmp_path / 'm' / case.file))}")


def sharded(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into)
    (into / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(into, max_shard_size="60KB")
    return into


def test_absent_shards_are_named(tiny_model: Path, tmp_path: Path) -> None:
    path = sharded(tiny_model, tmp_path / "m")
    files = weight_files.loaded(path, FIELD)
    assert len(files) > 2
    weight_files.check(path, FIELD)
    files[1].unlink()
    with pytest.raises(Failure) as failure:
        weight_files.check(path, FIELD)
    assert (
        failure.value.message
        == f"{FIELD}: 1 of the {len(files)} files that {path / 'model.safetensors.index.json'} names are absent:"
        f" {files[1].name}. Copy or download them, too"
    )
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(Failure, match=r"has \d shards \(.*\), but no model\.safetensors\.index\.json"):
        weight_files.check(path, FIELD)


@pytest.mark.parametrize("kind", ["FineTuneJob", "GenerateJob"])
def test_prepare_of_both_kinds_finds_damage(
    kind: str, make_run: MakeRun, make_generate_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_text(POINTER)
    make = make_run if kind == "FineTuneJob" else make_generate_run
    with pytest.raises(Failure, match=r"spec\.model\.path: .*model\.safetensors is a pointer of git-lfs") as failure:
        main(make(model={"path": str(tmp_path / "m")}))
    assert failure.value.code is ExitCode.INVALID_SPEC


def test_weights_that_lie_beside_the_model_do_not_count(tiny_model: Path, tmp_path: Path) -> None:
    """Llama's own `consolidated.safetensors`, and an adapter."""
    path = sharded(tiny_model, tmp_path / "m")
    plain = weight_files.count(tiny_model, FIELD)
    assert plain == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    shutil.copyfile(tiny_model / "model.safetensors", path / "consolidated.safetensors")
    save_file({"a": torch.zeros(7)}, path / "adapter_model.safetensors")
    assert weight_files.count(path, FIELD) == plain
    (path / "consolidated.safetensors").write_text(POINTER)  # what is not loaded need not be whole
    weight_files.check(path, FIELD)


def test_mismatched_sizes_are_ignored_for_the_head_alone(models: dict[str, Path], tmp_path: Path) -> None:
    labels = ["a", "b"]
    model = loaded("text-classification", models["classifier"], labels).model
    assert model.classifier.out_features == 2
    path = changed(models["classifier"], tmp_path / "m", rows_added(8))
    with pytest.raises(
        Failure,
        match=(
            r"spec\.model: .* has bert\.embeddings\.word_embeddings\.weight in another shape than its config\.json says"
        ),
    ):
        loaded("text-classification", path, labels)


@dataclass(frozen=True)
class ConvertedCase:
    model_type: str
    task: str
    settings: dict[str, Any]
    weight: str
    missed: str


CONVERTED = [
    ConvertedCase(
        model_type="swin",
        task="image-classification",
        settings={},
        weight="encoder.layers.0.blocks.0.attention.self.query.weight",
        missed="attention.q_proj.weight",
    ),
    ConvertedCase(
        model_type="gemma3_text",
        task="causal-lm",
        settings={"num_hidden_layers": 2},
        weight="layers.0.self_attn.q_proj.weight",
        missed="q_proj.weight",
    ),
    ConvertedCase(
        model_type="gpt2",
        task="causal-lm",
        settings={"n_layer": 2},
        weight="h.1.attn.c_attn.weight",
        missed="c_attn.weight",
    ),
    ConvertedCase(
        model_type="mixtral",
        task="causal-lm",
        settings={"num_hidden_layers": 2, "num_local_experts": 3},
        weight="layers.1.block_sparse_moe.experts.2.w1.weight",
        missed="one of them is absent",
    ),
    ConvertedCase(
        model_type="qwen3_moe",
        task="causal-lm",
        settings={"num_hidden_layers": 2, "num_experts": 4},
        weight="layers.0.mlp.experts.3.down_proj.weight",
        missed="experts.down_proj",
    ),
]


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.model_type)
def test_names_in_files_may_differ_from_those_in_memory(case: ConvertedCase) -> None:
    """Experts are fused and weights renamed when a model is loaded. The names in its files are those that transformers
    would save.
    """
    task = case.task
    config = AutoConfig.for_model(case.model_type, **case.settings)
    model = inspect.skeleton(config, task, FIELD)
    tied = set(model.all_tied_weights_keys)
    files = revert_weight_conversion(model, {name: w for name, w in model.state_dict().items() if name not in tied})
    there = {name: tuple(w.shape) for name, w in files.items()}
    assert weight_check.lacking(weight_check.compare(there, config, task, FIELD), task) == []
    name = next(name for name in there if name.endswith(case.weight))
    del there[name]
    try:
        lacking = weight_check.lacking(weight_check.compare(there, config, task, FIELD), task)
    except Failure as failure:
        lacking = [failure.message]
    assert any(case.missed in line for line in lacking)
