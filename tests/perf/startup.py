"""From the start of the container's process to the first training step, in parts, beside the limit: the imports that no
trainer can avoid.

The supervisor starts as in a pod; two of them, as two pods, find each other on this machine. What is measured is read
off their own output as it comes. Byte-code must be compiled, as `make setup` and the image do it: without it every
start compiles 3,900 modules.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from perf import pods

from luthier_trainer.bench.cases import Case, make_model, run_of
from luthier_trainer.bench.rounds import prepare

ROUNDS = 3
STEPS = 60
PREPARE_SECONDS = 600  # at most
IMPORTS = (
    "import torch, datasets; from transformers import AutoModelForCausalLM, Trainer, TrainingArguments; from peft"
    " import get_peft_model"
)
MARKS = {"built": "training ", "first_step": "step 1/"}
"""Part → what the line begins with that ends it: model, adapter and loop stand; the first step is done."""


def start(root: Path, rank: int) -> subprocess.Popen[str]:
    folder = root / f"run-{rank}"
    folder.mkdir(exist_ok=True)
    variables = {
        "LUTHIER_RUN_DIR": str(folder),
        "LUTHIER_TERMINATION_LOG": str(folder / "termination.json"),
        "LUTHIER_NODE_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "LUTHIER_PEER_LOST_LINGER": "0",
    }
    command = [sys.executable, "-m", "luthier_trainer", "train", "--run", str(root / "run.json")]
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def measure(root: Path) -> dict[str, float]:
    """Seconds to each mark of rank 0."""
    begin = time.monotonic()
    pair = [start(root, rank) for rank in (0, 1)]
    found: dict[str, float] = {}
    assert pair[0].stdout is not None
    output = []
    for line in pair[0].stdout:
        output.append(line)
        for part, mark in MARKS.items():
            if line.startswith(mark):
                found.setdefault(part, time.monotonic() - begin)
        if len(found) == len(MARKS):
            break
    for pod in pair:
        pod.terminate()
    for pod in pair:
        pod.communicate()
    shutil.rmtree(root / "job/checkpoints")  # what they saved when they were stopped: the next ones begin anew
    if len(found) < len(MARKS):
        raise SystemExit("no first step:\n" + "".join(output[-20:]))
    return found


def imports() -> float:
    """Seconds that two processes need for the imports at the same time."""
    begin = time.monotonic()
    both = [
        subprocess.Popen([sys.executable, "-c", IMPORTS], env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in (0, 1)
    ]
    for process in both:
        process.wait()
    return time.monotonic() - begin


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model("tiny", root / "model", cpu=True)
        run = run_of(Case(), root, root / "model", STEPS)
        resources = run.spec.resources.model_copy(update={"nodes": 2})
        run = run.model_copy(update={"spec": run.spec.model_copy(update={"resources": resources})})
        prepare(run, root, time.monotonic() + PREPARE_SECONDS)
        rounds = [(measure(root), imports()) for _ in range(ROUNDS)]
    parts = {part: round(statistics.median(found[part] for found, _ in rounds), 2) for part in MARKS}
    bare = round(statistics.median(seconds for _, seconds in rounds), 2)
    return {
        "processes": {
            "pods": 2,
            "seconds_to": parts,
            "imports_alone_s": bare,
            "first_step_ratio_to_imports": round(parts["first_step"] / bare, 2),
        },
        "on_the_cluster": pods.main(),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
