"""What is started on each pod, for each shape and strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_trainer.distributed import launch
from luthier_trainer.distributed.strategy import deepspeed_config
from luthier_trainer.runtime.run_folder import run_dir


def given(resources: dict[str, Any], strategy: str, host: str = "127.0.0.1") -> tuple[FineTuneRun, PreparedRecord]:
    run = FineTuneRun.model_validate(
        {
            "name": "job",
            "workspace": "/w",
            "rendezvousHost": host,
            "spec": {"task": "causal-lm", "model": {"path": "/m"}, "dataset": {"files": ["a"]}, "resources": resources},
        }
    )
    source = {"source": "/m", "rows": 1}
    prepared = PreparedRecord.model_validate(
        {
            "model": {"source": "/m"},
            "dataset": source,
            "modelPath": "/m",
            "datasetPath": "/d",
            "plan": {"strategy": strategy, "worldSize": run.spec.resources.world_size},
        }
    )
    return run, prepared


@dataclass(frozen=True)
class CommandCase:
    name: str
    resources: dict[str, Any]
    strategy: str
    node: int
    expect: str  # a part of the command line


COMMANDS = [
    CommandCase(
        name="alone on CPU",
        resources={"gpusPerNode": 0},
        strategy="none",
        node=0,
        expect="python -m luthier_trainer.worker train",
    ),
    CommandCase(
        name="alone on a GPU",
        resources={},
        strategy="none",
        node=0,
        expect="python -m luthier_trainer.worker train",
    ),
    CommandCase(
        name="two processes",
        resources={"gpusPerNode": 0, "processesPerNode": 2},
        strategy="ddp",
        node=0,
        expect="accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --machine_rank 0",
    ),
    CommandCase(
        name="one process in each of two pods",
        resources={"gpusPerNode": 1, "nodes": 2},
        strategy="ddp",
        node=1,
        expect="python -m luthier_trainer.worker train",
    ),
    CommandCase(
        name="second of two pods",
        resources={"gpusPerNode": 8, "nodes": 2},
        strategy="ddp",
        node=1,
        expect="accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 1",
    ),
    CommandCase(
        name="FSDP needs no other launcher than DDP",
        resources={"gpusPerNode": 8},
        strategy="fsdp",
        node=0,
        expect="accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 8 --machine_rank 0",
    ),
    CommandCase(
        name="DeepSpeed, alone",
        resources={},
        strategy="zero2-offload",
        node=0,
        expect="--num_machines 1 --num_processes 1 --machine_rank 0",
    ),
    CommandCase(
        name="DeepSpeed, two pods",
        resources={"gpusPerNode": 4, "nodes": 2},
        strategy="zero3",
        node=1,
        expect="--num_machines 2 --num_processes 8 --machine_rank 1",
    ),
]


@dataclass(frozen=True)
class ZeroCase:
    name: str
    settings: tuple[Any, ...]
    """strategy, whether on CPUs, weights of the model, nodes, processes of each."""
    expect: dict[str, Any]


ZERO = [
    ZeroCase(
        name="a small model",
        settings=("zero1", False, 1_000_000, 1, 8),
        expect={"stage": 1, "reduce_bucket_size": 10_000_000, "overlap_comm": True},
    ),
    ZeroCase(
        name="8 billion weights on one node",
        settings=("zero3", False, 8_000_000_000, 1, 8),
        expect={
            "reduce_bucket_size": 200_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "zero_hpz_partition_size": 1,
        },
    ),
    ZeroCase(
        name="over several nodes",
        settings=("zero3", False, 1_000_000_000, 2, 8),
        expect={"allgather_bucket_size": 31_250_000, "zero_hpz_partition_size": 8},
    ),
    ZeroCase(
        name="weights in the memory of several nodes",
        settings=("zero3-offload", False, 1_000_000_000, 2, 8),
        expect={"zero_hpz_partition_size": 1},
    ),
    ZeroCase(
        name="on CPUs",
        settings=("zero2", True, None, 1, 2),
        expect={"overlap_comm": False},
    ),
]


@pytest.mark.parametrize("case", ZERO, ids=lambda case: case.name)
def test_settings_of_zero(case: ZeroCase) -> None:
    config = deepspeed_config(*case.settings)["zero_optimization"]
    assert {name: config.get(name) for name in case.expect} == case.expect


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.name)
def test_command(case: CommandCase) -> None:
    command = launch.command(*given(case.resources, case.strategy), case.node)
    assert command[0] == sys.executable
    line = " ".join(command).replace(sys.executable, "python")
    assert case.expect in line
    assert "--cpu" not in command  # it would start jobs that know nothing of each other
    assert ("--config_file" in command) == case.strategy.startswith("zero")
    if "accelerate.commands.launch" in command:
        assert "--main_process_ip 127.0.0.1 --main_process_port 29500 --rdzv_backend static --same_network" in line
        assert line.endswith("--module luthier_trainer.worker train")


@dataclass(frozen=True)
class ZeroCase:
    strategy: str
    gpus: int
    stage: int
    optimizer_device: Any  # of DeepSpeed's configuration
    parameter_device: Any  # likewise


ZERO = [
    ZeroCase(
        strategy="zero2",
        gpus=1,
        stage=2,
        optimizer_device=None,
        parameter_device=None,
    ),
    ZeroCase(
        strategy="zero2-offload",
        gpus=1,
        stage=2,
        optimizer_device={"device": "cpu", "pin_memory": True},
        parameter_device=None,
    ),
    ZeroCase(
        strategy="zero2-offload",
        gpus=0,
        stage=2,
        optimizer_device={"device": "cpu", "pin_memory": False},
        parameter_device=None,
    ),
    ZeroCase(
        strategy="zero3",
        gpus=1,
        stage=3,
        optimizer_device=None,
        parameter_device=None,
    ),
    ZeroCase(
        strategy="zero3-offload",
        gpus=1,
        stage=3,
        optimizer_device={"device": "cpu", "pin_memory": True},
        parameter_device={"device": "cpu", "pin_memory": True},
    ),
    ZeroCase(
        strategy="zero3-offload",
        gpus=0,
        stage=3,
        optimizer_device={"device": "cpu", "pin_memory": False},
        parameter_device=None,
    ),
]


@pytest.mark.parametrize("case", ZERO, ids=lambda case: f"{case.strategy}-{case.gpus}-{case.stage}")
def test_deepspeed_files(case: ZeroCase) -> None:
    command = launch.command(*given({"gpusPerNode": case.gpus}, case.strategy), 0)
    accelerate = json.loads(Path(command[command.index("--config_file") + 1]).read_text())
    assert accelerate["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert accelerate["use_cpu"] == (case.gpus == 0)
    zero = json.loads((run_dir() / "deepspeed.json").read_text())["zero_optimization"]
    assert (zero["stage"], zero.get("offload_optimizer"), zero.get("offload_param")) == (
        case.stage,
        case.optimizer_device,
        case.parameter_device,
    )
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (case.stage == 3)


THREADS = [
    # resources                                              threads of each process
    ({"gpusPerNode": 0, "cpu": "4"}, 4),
    ({"gpusPerNode": 0, "cpu": "4", "processesPerNode": 3}, 1),
    ({"gpusPerNode": 0, "cpu": "1500m"}, 1),
    ({"gpusPerNode": 2, "cpu": "16"}, 8),
    ({"gpusPerNode": 0}, len(os.sched_getaffinity(0))),
    ({"gpusPerNode": 64}, 1),
]


@pytest.mark.parametrize(("resources", "threads"), THREADS)
def test_threads(resources: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    run, prepared = given(resources, "none")
    assert launch.environment(run, prepared, 0)["OMP_NUM_THREADS"] == str(max(1, threads))


def test_one_process_a_pod_is_told_where_the_others_are() -> None:
    run, prepared = given({"gpusPerNode": 1, "nodes": 3}, "ddp", host="job-node-0-0.job")
    expected = {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "job-node-0-0.job",
        "MASTER_PORT": "29500",
    }
    assert expected.items() <= launch.environment(run, prepared, 2).items()
    for resources, strategy in (({"gpusPerNode": 1}, "none"), ({"gpusPerNode": 2, "nodes": 2}, "ddp")):
        assert "RANK" not in launch.environment(*given(resources, strategy), 0)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = launch.environment(*given({"gpusPerNode": 0}, "ddp"), 0)
    assert {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }.items() <= cpu.items()
    gpu = launch.environment(*given({"gpusPerNode": 1}, "ddp", host="job-node-0-0.job"), 0)
    assert not {"CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR"} & gpu.keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what the pod says wins
    assert launch.environment(*given({"gpusPerNode": 0}, "ddp"), 0)["OMP_NUM_THREADS"] == "3"
    # Accelerate would overwrite it
    assert "--num_cpu_threads_per_process 3" in " ".join(launch.command(*given({"gpusPerNode": 2}, "ddp"), 0))


def test_nothing_heavy_is_imported() -> None:
    """The supervisor is PID 1: importing torch there would cost seconds and hundreds of megabytes."""
    script = (
        "import sys, luthier_trainer.distributed.launch;"
        " print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
