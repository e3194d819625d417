"""The command that starts the training processes of this pod, and their environment.

One process a pod is plain Python: it finds the others by itself, and a launcher would import torch once more before
it. Several processes, or DeepSpeed, go through `accelerate launch` with a static rendezvous, so that every pod can be
started alone. Imports no torch: it runs in PID 1.
"""

from __future__ import annotations

import json
import math
import os
import sys
from ipaddress import ip_address
from pathlib import Path

from luthier_api.quantity import amount
from luthier_api.resources import TrainingResources
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.status import Plan
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.distributed.strategy import deepspeed_config, uses_deepspeed
from luthier_trainer.runtime.compiler import needs_compiler
from luthier_trainer.runtime.cores import available
from luthier_trainer.runtime.run_folder import run_dir

MODULE = "luthier_trainer.worker"
ACCELERATE_FILE, DEEPSPEED_FILE = "accelerate.json", "deepspeed.json"


def command(run: FineTuneRun, prepared: PreparedRecord, node_rank: int) -> list[str]:
    """Arguments of the process to start on node `node_rank`. With DeepSpeed, its configuration is written to the run
    folder.
    """
    strategy, world_size = prepared.plan.strategy, run.spec.resources.world_size
    if is_alone(run, prepared):
        return [sys.executable, "-m", MODULE, "train"]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",  # `accelerate launch`, without importing its other commands
        # --multi_gpu chooses torch's agent; the device is chosen in `train`. --cpu would start independent jobs.
        *(
            ["--config_file", str(_write_deepspeed(run, prepared.plan))]
            if uses_deepspeed(strategy)
            else ["--multi_gpu"]
        ),
        "--num_machines",
        str(run.spec.resources.nodes),
        "--num_processes",
        str(world_size),
        "--machine_rank",
        str(node_rank),
        "--main_process_ip",
        run.rendezvous_host,
        "--main_process_port",
        str(run.rendezvous_port),
        "--rdzv_backend",
        "static",
        "--same_network",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        threads(run),
        "--module",
        MODULE,
        "train",
    ]


def is_alone(run: FineTuneRun, prepared: PreparedRecord) -> bool:
    """Whether one process trains in each pod, without DeepSpeed."""
    return run.spec.resources.processes == 1 and not uses_deepspeed(prepared.plan.strategy)


def place_among_pods(run: FineTuneRun, node_rank: int) -> dict[str, str]:
    """Variables by which torch finds the processes of the other pods: those that a launcher would set."""
    return {
        "RANK": str(node_rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(run.spec.resources.world_size),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": run.rendezvous_host,
        "MASTER_PORT": str(run.rendezvous_port),
    }


def environment(run: FineTuneRun, prepared: PreparedRecord, node_rank: int) -> dict[str, str]:
    """Variables that the processes need beside the pod's own; the pod's own win where both are set, except for the
    device, the rank and the place of compiled kernels.
    """
    wanted = {
        "OMP_NUM_THREADS": threads(run),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # `prepare` has fetched everything; a Hub that is down must not matter here
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if _is_loopback(run.rendezvous_host):
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # gloo resolves the host's name, which a container may not be able to
    if run.spec.resources.gpus_per_node:
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # 44 % of fragmentation without it
    environment = {name: os.environ.get(name, value) for name, value in wanted.items()}
    # Where DeepSpeed compiles its operators (a laptop), it calls `ninja` by name; another ninja than the environment's
    # compiles all anew.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if is_alone(run, prepared) and run.spec.resources.nodes > 1:
        environment |= place_among_pods(run, node_rank)
    if needs_compiler(run.spec):
        # The pod's own are in its /tmp, which a restarted pod has lost.
        folder = WorkspaceFolder(Path(run.workspace)).compiled
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    if not run.spec.resources.gpus_per_node:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def threads(run: FineTuneRun) -> str:
    """Threads of each process: what the pod says, else as many as it has cores.

    DeepSpeed's optimizer on CPU steps billions of weights with them.
    """
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores(run.spec.resources)))


def cores(resources: TrainingResources) -> int:
    """CPU cores of each process: its share of those that the job asks for, else of those that the pod may use."""
    cpus = amount(resources.cpu) if resources.cpu else available()
    return math.floor(cpus / resources.processes)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _write_deepspeed(run: FineTuneRun, plan: Plan) -> Path:
    """accelerate's configuration file, and DeepSpeed's beside it."""
    folder = run_dir()
    resources = run.spec.resources
    config = deepspeed_config(
        plan.strategy, resources.gpus_per_node == 0, plan.parameters, resources.nodes, resources.processes
    )
    (folder / DEEPSPEED_FILE).write_text(json.dumps(config, indent=1))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / DEEPSPEED_FILE),
            "deepspeed_multinode_launcher": "standard",  # no ssh: each pod starts its own processes
            "zero3_init_flag": False,
        },
        "num_machines": run.spec.resources.nodes,
        "num_processes": run.spec.resources.world_size,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": run.spec.resources.gpus_per_node == 0,
    }
    path = folder / ACCELERATE_FILE
    path.write_text(json.dumps(accelerate, indent=1))
    return path
