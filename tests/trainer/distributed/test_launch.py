"""What is started on each pod, for each shape and strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_trainer.distributed import launch
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


COMMANDS = [
    # name                        resources                                    strategy         node  the command has
    ("alone on CPU", {"gpusPerNode": 0}, "none", 0, "python -m luthier_trainer.worker train"),
    ("alone on a GPU", {}, "none", 0, "python -m luthier_trainer.worker train"),
    (
        "two processes",
        {"gpusPerNode": 0, "processesPerNode": 2},
        "ddp",
        0,
        "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --machine_rank 0",
    ),
    (
        "second of two pods",
        {"gpusPerNode": 8, "nodes": 2},
        "ddp",
        1,
        "accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 1",
    ),
    ("DeepSpeed, alone", {}, "zero2-offload", 0, "--num_machines 1 --num_processes 1 --machine_rank 0"),
    (
        "DeepSpeed, two pods",
        {"gpusPerNode": 4, "nodes": 2},
        "zero3",
        1,
        "--num_machines 2 --num_processes 8 --machine_rank 1",
    ),
]


@pytest.mark.parametrize(("name", "resources", "strategy", "node", "has"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_command(name: str, resources: dict[str, Any], strategy: str, node: int, has: str) -> None:
    command = launch.command(*given(resources, strategy), node)
    assert command[0] == sys.executable
    line = " ".join(command).replace(sys.executable, "python")
    assert has in line
    assert "--cpu" not in command  # it would start jobs that know nothing of each other
    assert ("--config_file" in command) == strategy.startswith("zero")
    if "accelerate.commands.launch" in command:
        assert "--main_process_ip 127.0.0.1 --main_process_port 29500 --rdzv_backend static --same_network" in line
        assert line.endswith("--module luthier_trainer.worker train")


ZERO = [
    # strategy         gpus  stage  optimizer on CPU                        parameters on CPU
    ("zero2", 1, 2, None, None),
    ("zero2-offload", 1, 2, {"device": "cpu", "pin_memory": True}, None),
    ("zero2-offload", 0, 2, {"device": "cpu", "pin_memory": False}, None),
    ("zero3", 1, 3, None, None),
    ("zero3-offload", 1, 3, {"device": "cpu", "pin_memory": True}, {"device": "cpu", "pin_memory": True}),
    ("zero3-offload", 0, 3, {"device": "cpu", "pin_memory": False}, None),
]


@pytest.mark.parametrize(("strategy", "gpus", "stage", "optimizer", "parameters"), ZERO)
def test_deepspeed_files(strategy: str, gpus: int, stage: int, optimizer: Any, parameters: Any) -> None:
    command = launch.command(*given({"gpusPerNode": gpus}, strategy), 0)
    accelerate = json.loads(Path(command[command.index("--config_file") + 1]).read_text())
    assert accelerate["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert accelerate["use_cpu"] == (gpus == 0)
    zero = json.loads((run_dir() / "deepspeed.json").read_text())["zero_optimization"]
    assert (zero["stage"], zero.get("offload_optimizer"), zero.get("offload_param")) == (stage, optimizer, parameters)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)


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
    assert launch.environment(run, prepared)["OMP_NUM_THREADS"] == str(max(1, threads))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = launch.environment(*given({"gpusPerNode": 0}, "ddp"))
    assert {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }.items() <= cpu.items()
    gpu = launch.environment(*given({"gpusPerNode": 1}, "ddp", host="job-node-0-0.job"))
    assert not {"CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR"} & gpu.keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what the pod says wins
    assert launch.environment(*given({"gpusPerNode": 0}, "ddp"))["OMP_NUM_THREADS"] == "3"
    # Accelerate would overwrite it
    assert "--num_cpu_threads_per_process 3" in " ".join(launch.command(*given({"gpusPerNode": 2}, "ddp"), 0))


def test_nothing_heavy_is_imported() -> None:
    """The supervisor is PID 1: importing torch there would cost seconds and hundreds of megabytes."""
    script = (
        "import sys, luthier_trainer.distributed.launch;"
        " print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
