"""Measures a training beside its peers: prepares it as a pod does, lets the programs take turns, and describes them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier_api.gpus import known
from luthier_api.run import FineTuneRun, Gpu, PreparedRecord
from luthier_api.status import Plan
from luthier_trainer.bench import rounds
from luthier_trainer.bench.contestants import DESCRIBED
from luthier_trainer.bench.rounds import OURS, Course, Program, Unmeasured
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.flops import Flops, per_unit

ASK_FOR_GPU = """
import json, torch
of = torch.cuda.get_device_properties(0)
print(json.dumps([of.name, of.total_memory]))
"""
PACKAGES = ("torch", "transformers", "diffusers", "peft", "trl", "bitsandbytes")


def measurable(run: FineTuneRun, steps: int) -> FineTuneRun:
    """Return the job for `steps` steps, without what is not measured: checkpoints, evaluations, uploads and trackers.

    Raises Unmeasured if it trains in several processes.
    """
    spec = run.spec
    if spec.resources.world_size > 1:
        raise Unmeasured(
            f"spec.resources: the job trains in {spec.resources.world_size} processes, and one is measured. Set nodes:"
            " 1, and gpusPerNode: 1 or 0"
        )
    training = spec.training.model_copy(
        update={
            "max_steps": steps,
            "warmup_steps": min(spec.training.warmup_steps, steps - 1),
            "save_every": "steps",
            "save_steps": 1_000_000,
            "eval_every": "steps",
            "eval_steps": None,
            "load_best_model": False,
            "early_stopping": None,
            "metric": None,
        }
    )
    dataset = spec.dataset.model_copy(update={"eval_fraction": None, "eval_split": None, "eval_files": None})
    changed = spec.model_copy(update={"training": training, "dataset": dataset, "hub": None, "tracking": []})
    return run.model_copy(update={"spec": changed, "metrics_port": 0})


def peers_of(run: FineTuneRun, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the peers that can do this training, and why the others cannot: name → reason."""
    left_out: dict[str, str] = {}
    spec = run.spec
    for name in asked:
        if spec.task != "causal-lm":
            left_out[name] = f"only trainings of causal-lm are compared, and this is {spec.task}"
        elif name == "plain" and spec.training.packing == "isolated":
            left_out[name] = "transformers alone does not pack rows"
    return [name for name in asked if name not in left_out], left_out


def start(root: Path, course: Course, peers: Sequence[str], cpu: bool) -> list[Program]:
    """Start the processes of the training that is prepared in `root`, which import what they need and then wait."""
    return [Program.start(name, root / "run.json", root, course, cpu) for name in (OURS, *peers)]


def measure(
    programs: Sequence[Program], prepared: PreparedRecord, course: Course, deadline: float, found_on: Device
) -> dict[str, Any]:
    """Let the programs take turns, and return the figures. Raises Unmeasured if ours could not be measured."""
    failed = {}
    ready = []
    try:
        for program in programs:
            try:
                program.wait("ready", deadline)
                ready.append(program)
            except Unmeasured as error:
                if program.name == OURS:
                    raise
                failed[program.name] = str(error)
        failed |= rounds.take_turns(ready, course, deadline)
    finally:
        for program in programs:
            program.end()
    (ours, *peers) = ready
    tokens = rounds.tokens_of(ours)
    flops = None
    if prepared.compute is not None:
        flops = per_unit(prepared.compute, recomputed=bool(prepared.plan.gradient_checkpointing))
    found: dict[str, Any] = {
        "plan": prepared.plan.dump(),
        "flopsPerToken": flops and {"model": rounds.rounded(flops.model), "hardware": rounds.rounded(flops.hardware)},
        "course": {"warmup": course.warmup, "stepsOfABlock": course.block, "blocks": course.rounds},
        "tokensPerStep": rounds.rounded(sum(real for real, _ in tokens) / course.block / len(tokens)),
        "computedTokensPerStep": rounds.rounded(sum(c for _, c in tokens) / course.block / len(tokens)),
        OURS: figures(ours, course, tokens, flops, found_on) | beside_plan(ours, prepared.plan),
        "peers": {},
    }
    for peer in peers:
        if peer.name in failed:
            continue
        found["peers"][peer.name] = {
            "is": DESCRIBED[peer.name],
            **figures(peer, course, tokens, flops, found_on),
            "ours": rounds.compared(ours, peer),
        }
    if failed:
        found["failed"] = failed
    return found


def figures(
    program: Program, course: Course, tokens: Sequence[tuple[int, int]], flops: Flops | None, found_on: Device
) -> dict[str, Any]:
    """Return the figures of a program: `rounds.figures`, and what they are of the device's operations per second.

    MFU counts the tokens that are learnt from, HFU also padding and what is recomputed (`workspace.flops`).
    """
    found = rounds.figures(program, course, tokens)
    if flops is None:
        return found
    rates = {
        "modelFlopsPerSecond": flops.model * found["tokensPerSecond"],
        "hardwareFlopsPerSecond": flops.hardware * found["computedTokensPerSecond"],
    }
    if found_on.peak_flops:
        rates["mfu"] = rates["modelFlopsPerSecond"] / found_on.peak_flops
        rates["hfu"] = rates["hardwareFlopsPerSecond"] / found_on.peak_flops
    return found | {name: rounds.rounded(value) for name, value in rates.items()}


def beside_plan(program: Program, plan: Plan) -> dict[str, Any]:
    """Return what the plan expects of time and memory, and the measured peak as a part of it."""
    found: dict[str, Any] = {}
    if plan.seconds and plan.steps:
        found["plannedSecondsPerStep"] = rounds.rounded(plan.seconds / plan.steps)
    if plan.memory:
        expected = gpu_memory.tensors(plan.memory) if plan.memory.gpu else plan.memory.host_bytes
        found["plannedPeakBytes"] = expected
        found["peakOfPlanned"] = rounds.rounded(program.memory["donepeak"] / expected)
    return found


@dataclass(frozen=True)
class Device:
    """What trains or generates."""

    name: str = "CPU, one core for each program"
    memory: int | None = None
    """Bytes of a GPU."""
    peak_flops: float | None = None
    """Dense 16-bit operations per second of a GPU, where they are known."""
    bandwidth: float | None = None
    """Bytes per second of its memory, likewise."""

    @property
    def gpu(self) -> Gpu | None:
        """What an administrator would say of it, by which `prepare` plans."""
        if self.memory is None:
            return None
        return Gpu(memory=self.memory, peak_flops=self.peak_flops, bandwidth=self.bandwidth)


def device(gpu: bool) -> Device:
    """Return the first GPU, asked for in a process of its own so that this one never holds it. Raises Unmeasured."""
    if not gpu:
        return Device()
    done = subprocess.run([sys.executable, "-c", ASK_FOR_GPU], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unmeasured(f"there is no GPU here: {done.stderr.strip().splitlines()[-1:]}")
    name, memory = json.loads(done.stdout.splitlines()[-1])
    info = known(name)
    return Device(name, memory, info.peak_flops, info.bandwidth) if info else Device(name, memory)


def surroundings(found: Device) -> dict[str, Any]:
    """Return what the figures depend on: the device and the versions of the libraries."""
    return {
        "device": found.name,
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def train(
    run: FineTuneRun, root: Path, course: Course, asked: Sequence[str], seconds: float, found_on: Device
) -> dict[str, Any]:
    """Return the figures of one training. `root`: a folder of its own. Raises Unmeasured."""
    deadline = time.monotonic() + seconds
    run = measurable(run.model_copy(update={"workspace": str(root / "job")}), course.steps)
    peers, left_out = peers_of(run, asked)
    prepared = rounds.prepare(run, root, deadline)
    programs = start(root, course, peers, cpu=run.spec.resources.gpus_per_node == 0)
    found = measure(programs, prepared, course, deadline, found_on)
    if left_out:
        found["leftOut"] = left_out
    return found
