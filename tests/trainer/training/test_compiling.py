"""Blocks that are compiled in their places compute the same, once for all of them, and go on after a stop."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run
from safetensors.torch import load_file
from trainer.distributed.test_launch import given
from trainer.training.test_optimizers import stop_at
from transformers import AutoModelForCausalLM

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.distributed import launch
from luthier_trainer.runtime import compiler, devices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import compiling
from luthier_trainer.training import main as train


def test_the_blocks_of_a_model_are_its_layers(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(block)] for block in compiling.blocks_of(model)] == ["model.layers.0", "model.layers.1"]


def test_compiled_blocks_learn_the_same_and_go_on_after_a_stop(
    tmp_path: Path,
    llama: Path,
    prose_data: DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without Inductor, whose compiler takes a minute here: what is compiled, and how often, is the same."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = DatasetDict(train=prose_data["train"].select(range(16)))

    def job(name: str, **training: Any) -> Any:
        common = {"maxSteps": 3, "batchSize": 4, "gradientCheckpointing": True}
        method = {"type": "lora", "rank": 4}
        return prepared_run(tmp_path / name, llama, data, method=method, training=common | training)

    plain, compiled = job("plain"), job("compiled", torchCompile=True)
    assert train.main(plain).code == 0
    stop_at(compiled, 2, monkeypatch)
    assert train.main(compiled).code == 0
    assert ", 2 blocks compiled," in capfd.readouterr().out
    # One graph for one length of rows, and one for all others: not one for each block.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    weights = [load_file(tmp_path / f"{name}/result/adapter_model.safetensors") for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()


def spec_of(gpus: int, **training: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"files": ["rows.txt"]},
            "training": training,
            "resources": {"gpusPerNode": gpus},
        }
    )


@dataclass(frozen=True)
class Image:
    name: str
    programs: tuple[str, ...]
    training: dict[str, Any] = field(default_factory=lambda: {"torchCompile": True})
    gpus: int = 1
    variables: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


IMAGES = [
    Image(
        name="Triton and gcc",
        programs=("gcc",),
    ),
    Image(
        name="Triton without a compiler",
        programs=("g++",),
        missing="torchCompile: torch compiles for it in the pods, and this image lacks a compiler (gcc, clang, cc)",
    ),
    Image(
        name="FlexAttention without a compiler",
        programs=(),
        training={"attention": "flex_attention"},
        missing="attention: torch compiles for it in the pods, and this image lacks a compiler",
    ),
    Image(
        name="a compiler of another name",
        programs=("zig",),
        variables={"CC": "zig cc"},
    ),
    Image(
        name="a CPU with a C compiler alone",
        programs=("gcc",),
        gpus=0,
        missing="this image lacks a compiler (g++, clang++)",
    ),
    Image(
        name="nothing to compile",
        programs=(),
        training={},
    ),
]


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_without_a_compiler_is_refused(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in image.programs else None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in image.variables.items():
        monkeypatch.setenv(name, value)
    spec = spec_of(image.gpus, **image.training)
    if image.missing is None:
        compiler.check(spec)
        return
    with pytest.raises(Failure) as refused:
        compiler.check(spec)
    assert image.missing in refused.value.message
    assert "COMPILER=gcc" in refused.value.message


def test_what_is_compiled_is_kept_in_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # torch sets the first one in its own process
        monkeypatch.delenv(name, raising=False)
    run, prepared = given({}, "none")
    assert "TORCHINDUCTOR_CACHE_DIR" not in launch.environment(run, prepared, 0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/inductor")  # as the pods of the operator have it
    compiled = run.model_copy(update={"spec": spec_of(1, torchCompile=True)})
    environment = launch.environment(compiled, prepared, 0)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/w/compiled"
    assert environment["TRITON_CACHE_DIR"] == "/w/compiled/triton"


@dataclass(frozen=True)
class Rounding:
    name: str
    asked: bool | None
    precision: str
    capability: tuple[int, int]
    expect: bool


ROUNDINGS = [
    Rounding("by bf16", None, "bf16", (9, 0), True),
    Rounding("not by fp32", None, "fp32", (9, 0), False),
    Rounding("asked for", True, "fp32", (8, 0), True),
    Rounding("not wanted", False, "bf16", (8, 0), False),
    Rounding("before Ampere", None, "fp16", (7, 5), False),
]


@pytest.mark.parametrize("case", ROUNDINGS, ids=lambda case: case.name)
def test_products_in_tf32(case: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: case.capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    assert devices.use_tf32(case.asked, case.precision, cpu=False) == case.expect
    assert set_to == ["high" if case.expect else "highest"]
    assert not devices.use_tf32(None, "fp32", cpu=True)


def test_tf32_is_refused_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(Failure, match=r"spec\.training\.tf32: Tesla T4 does not have it"):
        devices.use_tf32(True, "fp32", cpu=False)
